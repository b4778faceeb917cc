// Usage: node check.js FILE: a dashboard's JSON, held against the types of the newest Grafana.

import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";

// JSON has an enumeration's value where TypeScript wants its name.
writeFileSync("dashboard.ts", `import type { Dashboard } from "@grafana/schema";
type Written<T> = T extends string ? \`\${T}\`
  : T extends object ? { [K in keyof T]: Written<T[K]> } : T;
export const dashboard: Written<Dashboard> = ${readFileSync(process.argv[2], "utf8")};
`);
const options = ["--strict", "--noEmit", "--skipLibCheck", "--module", "nodenext"];
const done = spawnSync("npx", ["tsc", ...options, "dashboard.ts"], { stdio: "inherit" });
process.exitCode = done.status ?? 1;
