// Reads an object of monitoring.coreos.com/v1 as JSON, and holds it against the operator's schema, which
// knows what is missing or wrong, and against its types, which know what does not exist.

import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import * as kinds from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/index";

const text = readFileSync(0, "utf8");
const object = JSON.parse(text);
new kinds[object.kind](object).validate();
writeFileSync("object.ts", `
import type { I${object.kind} } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/${object.kind}";
export const object: I${object.kind} = ${text};
`);
const options = ["--strict", "--noEmit", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"];
const done = spawnSync("npx", ["tsc", ...options, "object.ts"], { encoding: "utf8" });
if (done.status !== 0) {
  console.error(done.stdout + done.stderr);
  process.exitCode = 1;
}
