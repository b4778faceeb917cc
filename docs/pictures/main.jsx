// Draws the dashboard by Perses, from the Prometheus behind /prometheus; ?from=&to= in milliseconds.

import { createTheme, CssBaseline, ThemeProvider } from "@mui/material";
import { ChartsProvider, generateChartsTheme, SnackbarProvider } from "@perses-dev/components";
import { Dashboard, DashboardProvider, DatasourceStoreProvider, VariableProvider } from "@perses-dev/dashboards";
import { dynamicImportPluginLoader, PluginRegistry, TimeRangeProvider } from "@perses-dev/plugin-system";
import * as prometheus from "@perses-dev/prometheus-plugin";
import * as stat from "@perses-dev/stat-chart-plugin";
import * as history from "@perses-dev/status-history-chart-plugin";
import * as lines from "@perses-dev/timeseries-chart-plugin";
import { QueryClient, QueryClientProvider } from "@tanstack/react-query";
import { createRoot } from "react-dom/client";
import { MemoryRouter } from "react-router-dom";

import grafana from "virtual:dashboard";
import { perses } from "./perses.js";

const source = {
  kind: "GlobalDatasource",
  metadata: { name: "prometheus" },
  spec: { default: true, plugin: { kind: "PrometheusDatasource", spec: { directUrl: "/prometheus", scrapeInterval: "1s" } } },
};
const sources = {
  getDatasource: async () => undefined,
  getGlobalDatasource: async () => source,
  listDatasources: async () => [],
  listGlobalDatasources: async () => [source],
};
const plugins = dynamicImportPluginLoader(
  [prometheus, stat, history, lines].map((plugin) => ({
    resource: plugin.getPluginModule(),
    importPlugin: async () => plugin,
  })),
);
const theme = createTheme();
const asked = new URLSearchParams(location.search);
const range = { start: new Date(+asked.get("from")), end: new Date(+asked.get("to")) };
const dashboardResource = perses(grafana);

createRoot(document.getElementById("root")).render(
  <MemoryRouter>
    <ThemeProvider theme={theme}>
      <CssBaseline />
      <ChartsProvider chartsTheme={generateChartsTheme(theme, {})}>
        <SnackbarProvider>
          <QueryClientProvider client={new QueryClient()}>
            <PluginRegistry pluginLoader={plugins}>
              <TimeRangeProvider timeRange={range}>
                <VariableProvider>
                  <DatasourceStoreProvider dashboardResource={dashboardResource} datasourceApi={sources}>
                    <DashboardProvider initialState={{ dashboardResource, isEditMode: false }}>
                      <Dashboard />
                    </DashboardProvider>
                  </DatasourceStoreProvider>
                </VariableProvider>
              </TimeRangeProvider>
            </PluginRegistry>
          </QueryClientProvider>
        </SnackbarProvider>
      </ChartsProvider>
    </ThemeProvider>
  </MemoryRouter>,
);
