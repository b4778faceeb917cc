// Turns the Grafana dashboard into the same one for Perses.

const KINDS = { timeseries: "TimeSeriesChart", "state-timeline": "StatusHistoryChart", stat: "StatChart" };
const UNITS = { s: "seconds", percentunit: "percent-decimal", ops: "ops/sec" };
// Perses has a palette of its own; a state keeps Grafana's colour.
const COLORS = {
  green: "#73bf69", "light-green": "#96d98d", orange: "#ff9830", "dark-orange": "#fa6400", red: "#f2495c",
  "light-red": "#ff7383", "dark-red": "#c4162a", purple: "#b877d9", blue: "#5794f2",
  "super-light-blue": "#c0d8ff", "super-light-yellow": "#ffee52",
};

function query(target) {
  const expr = target.expr.replaceAll("$job", "ublkwatch").replaceAll("$instance", ".*").replaceAll("$device", ".*")
    .replaceAll("$__range_s", "60").replaceAll("$__range", "1m").replaceAll("$__rate_interval", "10s");
  const spec = { query: expr, seriesNameFormat: target.legendFormat.replace("__auto", "") };
  return { kind: "TimeSeriesQuery", spec: { plugin: { kind: "PrometheusTimeSeriesQuery", spec } } };
}

function options(panel) {
  const { unit, mappings, custom } = panel.fieldConfig.defaults;
  const format = { unit: UNITS[unit] ?? "decimal", shortValues: true };
  const legend = { position: "bottom", mode: "list", size: "small" };
  if (panel.type === "stat") return { calculation: "last-number", format };
  if (panel.type === "timeseries") {
    const stack = custom.stacking.mode === "normal" ? "all" : undefined;
    return { legend, yAxis: { format, min: 0 }, visual: { stack, areaOpacity: custom.fillOpacity / 100, lineWidth: 1.5 } };
  }
  const entries = Object.entries(mappings[0].options);
  return {
    legend: undefined,
    mappings: entries.map(([value, { text, color }]) => ({
      kind: "Value", spec: { value, result: { value: text, color: COLORS[color] } },
    })),
  };
}

export function perses(grafana) {
  const panels = {}, layouts = [];
  for (const panel of grafana.panels) {
    const key = `panel${panel.id}`;
    const { x, y, w: width, h: height } = panel.gridPos;
    if (panel.type === "row") {
      layouts.push({ kind: "Grid", spec: { display: { title: panel.title }, items: [] } });
    } else if (KINDS[panel.type]) {
      panels[key] = {
        kind: "Panel",
        spec: {
          display: { name: panel.title, description: panel.description },
          plugin: { kind: KINDS[panel.type], spec: options(panel) },
          queries: panel.targets.map(query),
        },
      };
      const items = layouts.at(-1).spec.items;
      items.push({ x, y, width, height, content: { $ref: `#/spec/panels/${key}` } });
    }
  }
  return {
    kind: "Dashboard",
    metadata: { name: "ublkwatch", project: "ublkwatch", version: 0 },
    spec: { display: { name: grafana.title }, duration: "1m", variables: [], panels, layouts },
  };
}
