"""The house rules of ARCHITECTURE.md, read off the syntax trees: layers, homes, ceilings."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ublkwatch"

# Who may import whom within the package. An edge never knows another edge.
LAYERS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    # L0: nouns and numbers
    "uapi": set(),
    "model": {"uapi"},
    "events": {"model"},
    "care": {"model"},
    "settings": {"care", "model"},
    "traits": set(),
    "spans": set(),
    # L1: decisions and documents, pure
    "verdict": {"events", "model"},
    "pace": {"events", "model", "verdict"},
    "attempt": {"events", "model", "pace", "verdict"},
    "ailing": {"events", "model", "uapi", "verdict"},
    "symptoms": {"model"},
    "orders": {"ailing", "attempt", "events", "model", "uapi", "verdict"},
    "timers": {"attempt", "pace", "events", "model", "orders", "uapi", "verdict"},
    "resume": {"ailing", "attempt", "pace", "events", "model", "orders", "verdict"},
    "outage": {"attempt", "pace", "events", "model", "orders", "uapi", "verdict"},
    "shared": {"attempt", "events", "model", "orders", "verdict"},
    "deaf": {"events", "model"},
    "recovery": {
        *("ailing", "attempt", "deaf", "events", "model", "orders", "outage", "pace", "resume"),
        *("shared", "timers", "uapi", "verdict"),
    },
    "chronicle": {"events", "model"},
    "meter": {"model"},
    "measures": {"model", "uapi"},
    "downtime": {"model", "uapi"},
    "foretell": {"ailing", "model", "orders", "pace", "spans", "verdict"},
    "status": {"care", "chronicle", "foretell", "model", "uapi"},
    "explain": {"foretell", "model", "spans", "status", "uapi"},
    "page": {"spans"},
    "sheet": {"page", "spans"},
    "past": {"model", "page", "spans"},
    "finding": set(),
    "kernels": set(),
    "wire": {"model"},
    "prospect": {"care", "events", "model"},
    "drilling": {"model"},
    "rules": {"care", "model"},
    "tables": {"care", "model", "rules", "settings", "traits"},
    # L2: edges
    "uring": {"uapi"},
    "async_ring": {"uapi", "uring"},
    "glance": {"uapi", "uring"},
    "ctrl": {"async_ring", "glance", "meter", "model", "uapi", "uring"},
    "ctrl_worker": {"armour", "async_ring", "ctrl", "meter"},
    "armour": set(),
    "apart": set(),
    "outside": {"armour"},
    "placement": set(),
    "together": set(),
    "discover": {"model"},
    "diskstats": {"model"},
    "threads": {"symptoms"},
    "server": {"care", "model", "together"},
    "homes": set(),
    "cgroup": set(),
    "host": {"care", "trust"},
    "identity": {"care", "trust"},
    "bus": set(),
    "gate": {"armour"},
    "fork": {"care", "cgroup", "gate", "identity"},
    "transient": {"care", "identity"},
    "units": {
        *("bus", "care", "cgroup", "fork", "homes", "host", "identity", "outside", "transient"),
    },
    "launch": {
        *("bus", "care", "cgroup", "fork", "homes", "host", "identity", "model", "outside"),
        *("together", "units"),
    },
    "store": {"care", "model", "trust"},
    "trust": set(),
    "config": {"model", "rules", "settings", "tables", "trust"},
    "profiles": {"care", "model", "traits"},
    "kept": set(),
    "admin": {"wire", "settings"},
    "client": {"wire"},
    "usage": set(),
    "scratch": set(),
    "kmsg": set(),
    "memory": set(),
    "trail": set(),
    "collect": {"measures", "model", "status"},
    "metrics": {
        *("", "collect", "downtime", "events", "measures", "meter", "model", "status", "uapi"),
    },
    "scrape": set(),
    "health": set(),
    "notify": set(),
    "service": {"trust"},
    "log": {"events", "model", "status"},
    # L3: the shell; its edges come in by Protocol
    "lanes": set(),
    "starts": {"care", "events", "lanes", "model"},
    "ends": {"care", "events", "model", "starts"},
    "wishes": {"care", "model", "starts"},
    "standby": {"care", "model", "wishes"},
    "standbys": {"care", "model", "standby", "starts", "wishes"},
    "who": {"care", "model", "perform", "rules"},
    "perform": {
        *("care", "ends", "events", "lanes", "meter", "model", "rules", "standby", "standbys"),
        *("starts", "symptoms"),
    },
    "pulse": {"events", "model", "perform", "symptoms", "together", "uapi"},
    "unsaved": {"events"},
    "unreadable": set(),
    "atrest": {"care", "model", "rules", "uapi"},
    "lookout": {
        *("atrest", "attempt", "events", "model", "perform", "starts", "uapi", "unreadable"),
        *("unsaved", "who"),
    },
    "monitor": {
        *("ailing", "attempt", "care", "chronicle", "events", "lookout", "model", "orders"),
        *("perform", "pulse", "recovery", "starts", "unsaved", "who"),
    },
    # L4: composition
    "siting": {"care", "config", "placement"},
    "news": {"chronicle", "kmsg", "meter", "store", "trail"},
    "bulletin": set(),
    "probes": {"driver", "health", "metrics", "scrape"},
    "driver": {"async_ring", "ctrl", "uapi"},
    "checking": {
        *("care", "config", "finding", "host", "identity", "settings", "store", "tables", "trust"),
    },
    "examined": {
        *("async_ring", "checking", "client", "config", "ctrl", "discover", "finding", "model"),
        *("server", "settings", "siting", "uapi", "units", "wire"),
    },
    "doctor": {"", "driver", "examined", "finding", "host", "kernels", "model", "uapi"},
    "stopping": {"model", "uapi", "usage", "wire"},
    "rounds": {"drilling", "model", "server", "store"},
    "library": {
        *("care", "config", "host", "model", "profiles", "prospect", "rules", "settings"),
        *("tables", "trust"),
    },
    "desk": {
        *("", "admin", "attempt", "config", "drilling", "events", "library", "meter", "model"),
        *("monitor", "orders", "prospect", "recovery", "settings", "stopping", "uapi", "wire"),
    },
    "registering": {"config", "host", "library", "settings", "store", "tables", "wire"},
    "daemon": {
        *("", "admin", "apart", "armour", "bulletin", "care", "chronicle", "config", "ctrl"),
        *(
            "ctrl_worker",
            "desk",
            "discover",
            "diskstats",
            "driver",
            "events",
            "fork",
            "health",
            "host",
            "identity",
            "kept",
        ),
        "lanes",
        *("launch", "library", "log", "metrics", "model", "monitor", "news", "perform", "probes"),
        *("memory", "notify", "page", "rules", "server", "standby"),
        *("settings", "siting", "status", "stopping", "store", "threads", "uapi"),
        *("usage", "wire"),
    },
    # The command line: a verb knows no other, but for how a wish is brought to the daemon
    "verbs": {"config"},
    "verbs.asking": {"client", "config", "verbs", "wire"},
    "verbs.order": {"model", "verbs", "verbs.asking", "wire"},
    "verbs.rules": {
        *("config", "registering", "settings", "store", "verbs", "verbs.asking", "wire"),
    },
    "verbs.stop": {
        *("client", "config", "ctrl", "ctrl_worker", "driver", "launch", "stopping", "usage"),
        *("verbs", "verbs.asking", "wire"),
    },
    "verbs.drill": {"client", "config", "model", "rounds", "verbs", "verbs.asking", "wire"},
    "verbs.doctor": {
        *("", "checking", "client", "config", "ctrl", "doctor", "driver", "examined", "finding"),
        *("model", "settings", "uapi", "verbs", "wire"),
    },
    "verbs.run": {"config", "daemon", "driver", "notify", "siting", "store", "verbs"},
    "verbs.service": {"service", "verbs"},
    "verbs.past": {"config", "page", "past", "store", "trail", "verbs"},
    "verbs.show": {"config", "page", "sheet", "verbs"},
    "verbs.tell": {"config", "explain", "foretell", "model", "status", "store", "verbs"},
    "cli": {
        *("", "config", "settings", "verbs", "verbs.doctor", "verbs.drill", "verbs.order"),
        *("verbs.past", "verbs.rules", "verbs.run", "verbs.service", "verbs.show", "verbs.stop"),
        "verbs.tell",
    },
}

# What acts on the world has one home each.
HOMES = {
    # The ring's buffers; and mlock and prctl, which no module of Python's has.
    "ctypes": {"armour", "uring"},
    # The ring; the shell's files, kept in memory where the gate is a shell; a drill's direct I/O.
    "mmap": {"gate", "scratch", "uring"},
    # Servers by fork, behind their gate; workers; operators' commands, the system's tools; a drill.
    "subprocess": {"fork", "gate", "launch", "outside", "rounds", "service"},
    "threading": {"apart", "armour"},
    "jeepney": {"bus", "units"},
    "psutil": {"server"},
    "pyroute2": {"discover"},
    "sqlite3": {"store"},
    # What is counted; what is true at a scrape.
    "prometheus_client": {"collect", "metrics"},
    "argparse": {
        *("cli", "verbs", "verbs.asking", "verbs.doctor", "verbs.drill", "verbs.order"),
        *("verbs.past", "verbs.rules", "verbs.run", "verbs.service", "verbs.show", "verbs.stop"),
        "verbs.tell",
    },
    "os.pidfd_open": {"server"},
    "signal.pidfd_send_signal": {"server"},
    "os.kill": set(),
    "os.system": set(),
    "os.fork": set(),
    "time.sleep": set(),
    "time.monotonic": {"verbs.tell", "bulletin", "daemon", "desk", "news", "rounds", "scratch"},
    "time.time": {
        *("verbs.past", "verbs.show", "verbs.tell", "desk", "daemon", "examined", "news", "rounds"),
    },
    "sys.exit": set(),
}
PURE = (
    *("uapi", "model", "care", "events", "settings", "traits", "rules", "tables"),
    *("verdict", "pace", "attempt", "orders", "outage", "timers", "resume", "shared", "deaf"),
    *("recovery", "ailing", "symptoms", "foretell", "chronicle", "spans", "status", "explain"),
    *("page", "sheet", "past", "prospect", "drilling", "wire", "finding", "kernels"),
    *("meter", "measures", "downtime"),
)
HARMLESS = {
    *("__future__", "collections", "dataclasses", "enum", "errno", "string", "struct", "typing"),
    *("difflib", "fnmatch", "itertools", "json", "re", "textwrap", "types", "ublkwatch"),
}
CEILING = 400

FILES = {path.stem: path for path in PACKAGE.glob("*.py")} | {
    f"verbs.{path.stem}".removesuffix(".__init__"): path for path in PACKAGE.glob("verbs/*.py")
}
MODULES = sorted(FILES)


def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def imports(module: str) -> set[str]:
    """Return every module that it imports, wherever in it, by full name."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            known = {f"ublkwatch.{name}" for name in MODULES}
            package = node.module or ""
            inner = {f"{package}.{alias.name}" for alias in node.names} & known
            if package == "ublkwatch" and inner:
                found |= inner
            elif inner:
                found |= inner | {package}
            else:
                found.add(node.module or "")
    return found


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_may(module: str) -> None:
    own = {name.partition(".")[2] for name in imports(module) if name.split(".")[0] == "ublkwatch"}
    assert own <= LAYERS[module]


@pytest.mark.parametrize("module", PURE)
def test_what_is_pure_imports_nothing_that_acts(module: str) -> None:
    assert {name.split(".")[0] for name in imports(module)} <= HARMLESS


@pytest.mark.parametrize(("what", "homes"), HOMES.items())
def test_what_acts_has_one_home(what: str, homes: set[str]) -> None:
    users = set()
    for module in MODULES:
        names = {name.split(".")[0] for name in imports(module)}
        calls = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree(module))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        if what in names | calls:
            users.add(module)
    assert users == homes


@pytest.mark.parametrize("words", ["status", "hold 0", "reload", "stop 0", "version"])
def test_a_verb_that_only_asks_is_light(tmp_path: Path, words: str) -> None:
    config = tmp_path / "ublkwatch.toml"
    config.write_text(f'runtime_dir = "{tmp_path}/none"\nstate_dir = "{tmp_path}/none"\n')
    arguments = [*words.split(), "--config", str(config)]
    if words == "stop 0":
        arguments.append("--help")  # without a daemon it does the work itself
    script = (
        "import contextlib, sys\nfrom ublkwatch import cli\n"
        f"with contextlib.suppress(SystemExit):\n    cli.main({arguments!r})\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"asyncio", "ctypes", "jeepney", "prometheus_client", "psutil", "pyroute2", "sqlite3"}
    assert heavy.isdisjoint(loaded)
    assert len(loaded) < 250


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stays_below_the_ceiling(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= CEILING
