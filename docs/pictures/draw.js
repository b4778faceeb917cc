// Usage: node draw.js DASHBOARD PROMETHEUS DATA PICTURE: starts Prometheus on DATA, and takes a
// picture of the dashboard over the last minute in which it has scraped.

import { spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { chromium } from "playwright-core";
import { build, preview } from "vite";

const [dashboard, program, data, picture] = process.argv.slice(2);
const PORT = 19787;
const API = `http://127.0.0.1:${PORT}/api/v1/query`;

async function last() {
  for (let tries = 0; tries < 120; tries++, await sleep(500)) {
    const expr = "max(max_over_time(timestamp(ublkwatch_build_info)[6h:1s]))";
    const answer = await fetch(`${API}?query=${encodeURIComponent(expr)}`).catch(() => undefined);
    const found = answer?.ok && (await answer.json()).data.result[0];
    if (found) return Number(found.value[1]) * 1000;
  }
  throw new Error(`no data in ${data}`);
}

const shown = {
  name: "dashboard",
  resolveId: (id) => (id === "virtual:dashboard" ? "\0dashboard" : undefined),
  load: (id) => (id === "\0dashboard" ? `export default ${readFileSync(dashboard, "utf8")}` : undefined),
};
await build({ define: { global: "globalThis" }, plugins: [shown], logLevel: "error", build: { chunkSizeWarningLimit: 1e5 } });
writeFileSync("empty.yaml", "");
const prometheus = spawn(
  program,
  ["--config.file=empty.yaml", `--storage.tsdb.path=${data}`, `--web.listen-address=127.0.0.1:${PORT}`],
  { stdio: "ignore" },
);
try {
  const to = await last();
  const proxied = { target: `http://127.0.0.1:${PORT}`, rewrite: (path) => path.replace("/prometheus", "") };
  const server = await preview({ preview: { port: 0, proxy: { "/prometheus": proxied } } });
  const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
  const page = await browser.newPage({ viewport: { width: 1400, height: 2750 } });
  await page.goto(`${server.resolvedUrls.local[0]}?from=${to - 60_000}&to=${to}`);
  await page.waitForSelector("canvas", { timeout: 120_000 });
  // Charts come one by one, and are animated; what two looks show alike is done.
  let before, now = await page.screenshot();
  do {
    before = now;
    await sleep(10_000);
    now = await page.screenshot();
  } while (!now.equals(before));
  writeFileSync(picture, now);
  await browser.close();
  await server.close();
} finally {
  prometheus.kill();
}
