"""What the Grafana dashboard shows: deploy/grafana/ublkwatch.json is made from this."""

from __future__ import annotations

from grafana import DEVICE, NODE, WIDTH, Panel, Query, lines, mean, number, quantiles, timeline

from ublkwatch.model import Phase

BUDGET_S = 0.001 * 30 * 86400  # 99.9 % in 30 days, as the alerts have it

# What a timeline shows, in the order of its numbers, from 1 on, and in which colour.
STATES = {
    "live": "green",
    "quiesced": "orange",
    "fail_io": "red",
    "dead": "dark-red",
    "unknown": "purple",
}
_PHASE_COLORS = {
    Phase.OBSERVED: "super-light-blue",
    Phase.WATCHING: "green",
    Phase.GRACE: "super-light-yellow",
    Phase.HELD: "blue",
    Phase.PROBATION: "light-green",
    Phase.BACKOFF: "dark-orange",
    Phase.DECIDING: "light-red",
    Phase.FAILING: "red",
    Phase.FAILED: "dark-red",
}
PHASES = {
    phase.value: _PHASE_COLORS.get(phase, "orange") for phase in Phase if phase is not Phase.GONE
}
BAD = ((None, "green"), (1.0, "red"))
UNAVAILABLE = "ublkwatch_device_unavailable_seconds_total"

FLEET = (
    number("Nodes", "Targets that answer.", f"sum(up{{{NODE}}})"),
    number(
        "Devices",
        "All ublk devices, in whatever state.",
        f"sum(ublkwatch_devices{{{NODE}}})",
    ),
    number(
        "Without service",
        "Devices that wait for a server now, or whose I/O fails until they have one.",
        f'sum(ublkwatch_devices{{{NODE}, state=~"quiesced|fail_io"}})',
        steps=BAD,
    ),
    number(
        "Given up",
        "Devices that nobody tries to recover any more.",
        f'sum(ublkwatch_device_phase{{{NODE}, phase="failed"}})',
        steps=BAD,
    ),
    number(
        "Recovered",
        "Outages in the time shown that ended with a new server.",
        f'sum(increase(ublkwatch_recoveries_total{{{NODE}, result="success"}}[$__range]))',
        bounds={"decimals": 0},
    ),
    number(
        "Available",
        "Share of the time shown in which the average recoverable device was served.",
        f"1 - avg(increase({UNAVAILABLE}{{{NODE}}}[$__range])) / $__range_s",
        "percentunit",
        steps=((None, "red"), (0.999, "green")),
        bounds={"decimals": 3},
    ),
    lines(
        "Devices by state",
        "What the kernel says of all devices.",
        "short",
        Query(f"sum by (state) (ublkwatch_devices{{{NODE}}})", "{{state}}"),
        stacked=True,
    ),
    lines(
        "Outages by how they ended",
        "Counted, so that a recovery faster than a scrape is here, too.",
        "short",
        Query(
            f"sum by (result) (increase(ublkwatch_recoveries_total{{{NODE}}}[$__rate_interval]))",
            "{{result}}",
        ),
        stacked=True,
    ),
    lines(
        "Why servers were lost",
        "Causes of the outages that are over or were given up.",
        "short",
        Query(
            "sum by (cause) "
            f"(increase(ublkwatch_server_loss_causes_total{{{NODE}}}[$__rate_interval]))",
            "{{cause}}",
        ),
        stacked=True,
    ),
)

NODES = (
    lines(
        "Recovery time",
        "From the detection of a lost server to LIVE under a new one.",
        "s",
        *quantiles("recovery_duration_seconds", NODE),
    ),
    lines(
        "Phases of an outage",
        "Mean time in each phase; docs/recovery.md says what a phase waits for.",
        "s",
        mean("recovery_phase_duration_seconds", NODE, "phase"),
        stacked=True,
    ),
    lines(
        "Servers lost",
        "Outages by node.",
        "short",
        Query(
            "sum by (instance) "
            f"(increase(ublkwatch_server_losses_total{{{NODE}}}[$__rate_interval]))",
            "{{instance}}",
        ),
        stacked=True,
    ),
    lines(
        "Control commands",
        "Commands to the driver by their answer, without the poll's own.",
        "ops",
        Query(
            "sum by (command, result) (rate(ublkwatch_control_commands_total"
            f'{{{NODE}, command!~"GET_DEV_INFO|GET_FEATURES"}}[$__rate_interval]))',
            "{{command}} {{result}}",
        ),
    ),
    lines(
        "Control command time",
        "99th percentile of the time until a command was answered.",
        "s",
        quantiles("control_command_duration_seconds", NODE, "command")[1],
    ),
    lines(
        "Wedged commands, retired workers",
        "Commands that are out for longer than they may take, and workers given up for them.",
        "short",
        Query(
            f"sum by (instance) (ublkwatch_control_commands_wedged{{{NODE}}})",
            "{{instance}} wedged",
        ),
        Query(
            "sum by (instance) "
            f"(increase(ublkwatch_control_workers_retired_total{{{NODE}}}[$__rate_interval]))",
            "{{instance}} retired",
        ),
    ),
    lines(
        "Poll age",
        "Time since all devices were last looked at.",
        "s",
        Query(f"time() - ublkwatch_poll_last_success_timestamp_seconds{{{NODE}}}", "{{instance}}"),
    ),
    lines(
        "Event loop lag",
        "By how much the daemon's loop was late, at most, in the last minute.",
        "s",
        Query(f"ublkwatch_event_loop_lag_seconds{{{NODE}}}", "{{instance}}"),
    ),
    lines(
        "CPU of ublkwatch",
        "Of the daemon itself, without the servers that it starts.",
        "percentunit",
        Query(f"rate(process_cpu_seconds_total{{{NODE}}}[$__rate_interval])", "{{instance}}"),
    ),
)

DEVICES = (
    timeline(
        "Kernel state",
        "What the kernel says of each device at each scrape. What is shorter is not seen here, but "
        "counted below.",
        "device_state",
        "state",
        STATES,
    ),
    timeline(
        "Phase",
        "Where each device stands in a recovery, at each scrape.",
        "device_phase",
        "phase",
        PHASES,
    ),
    lines(
        "Time without service",
        "Share of the time in which nobody served the device.",
        "percentunit",
        Query(f"rate({UNAVAILABLE}{{{DEVICE}}}[$__rate_interval])", "{{instance}} {{device}}"),
    ),
    lines(
        "Held time",
        "How long I/O was held at the last recovery.",
        "s",
        Query(f"ublkwatch_device_last_held_seconds{{{DEVICE}}}", "{{instance}} {{device}}"),
    ),
    Panel(
        "bargauge",
        "Budget left",
        "Of the 43 minutes that a device may be without service in 30 days (99.9 %).",
        "percentunit",
        [
            Query(
                f"1 - increase({UNAVAILABLE}{{{DEVICE}}}[30d]) / {BUDGET_S:g}",
                "{{instance}} {{device}}",
                now=True,
            )
        ],
        steps=((None, "red"), (0.0, "orange"), (0.5, "green")),
        bounds={"min": 0, "max": 1},
        options={
            "displayMode": "basic",
            "orientation": "horizontal",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showUnfilled": True,
            "valueMode": "color",
        },
    ),
    lines(
        "Recoveries and failed attempts",
        "Outages by how they ended, and attempts that failed on the way.",
        "short",
        Query(
            "sum by (instance, device, result) "
            f"(increase(ublkwatch_recoveries_total{{{DEVICE}}}[$__rate_interval])) > 0",
            "{{instance}} {{device}} {{result}}",
        ),
        Query(
            "sum by (instance, device) "
            f"(increase(ublkwatch_recovery_attempt_failures_total{{{DEVICE}}}[$__rate_interval]))",
            "{{instance}} {{device}} failed attempts",
        ),
    ),
    lines(
        "Servers lost, by how it was seen",
        "pidfd: its end; poll: the kernel's state; startup: our first look; else why it was ended.",
        "short",
        Query(
            "sum by (source) "
            f"(increase(ublkwatch_server_losses_total{{{DEVICE}}}[$__rate_interval]))",
            "{{source}}",
        ),
        stacked=True,
    ),
    lines(
        "Hung I/O",
        "Servers that were alive and did not answer: found, and ended for it.",
        "short",
        Query(
            "sum by (instance, device) "
            f"(increase(ublkwatch_device_stalls_total{{{DEVICE}}}[$__rate_interval]))",
            "{{instance}} {{device}} found",
        ),
        Query(
            "sum by (instance, device) "
            f"(increase(ublkwatch_servers_ended_total{{{DEVICE}}}[$__rate_interval]))",
            "{{instance}} {{device}} ended",
        ),
    ),
    Panel(
        "table",
        "What they are",
        "What a crash means for each device's I/O (recovery_mode), who sends the recovery commands "
        "(handoff; empty: nobody), and failed attempts until it is given up (0: none is made).",
        "short",
        [
            Query(
                "sum by (instance, device, recovery_mode, handoff) "
                f"(ublkwatch_device_info{{{DEVICE}}} * on (job, instance, device) "
                f"group_left () (ublkwatch_device_attempts_left{{{DEVICE}}} "
                f"or ublkwatch_device_managed{{{DEVICE}}}))",
                now=True,
            )
        ],
        width=WIDTH,
        transformations=[
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True},
                    "indexByName": {},
                    "renameByName": {"Value": "attempts left"},
                },
            }
        ],
        options={"cellHeight": "sm", "showHeader": True},
    ),
)
ROWS = {"Fleet": FLEET, "Nodes": NODES, "Devices": DEVICES}
