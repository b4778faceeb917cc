"""The house rules of ARCHITECTURE.md, read off the syntax trees: layers, homes, ceilings."""

from __future__ import annotations

import ast
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
    "foretell": {"ailing", "model", "orders", "pace", "spans", "verdict"},
    "status": {"chronicle", "foretell", "model", "uapi"},
    "explain": {"foretell", "model", "spans", "status", "uapi"},
    "page": {"spans"},
    "sheet": {"page", "spans"},
    "past": {"model", "page", "spans"},
    "rules": {"care", "model"},
    "tables": {"care", "model", "rules", "settings", "traits"},
    # L2: edges
    "uring": {"uapi"},
    "async_ring": {"uapi", "uring"},
    "ctrl": {"async_ring", "model", "uapi", "uring"},
    "ctrl_worker": {"async_ring", "ctrl"},
    "together": set(),
    "discover": {"model"},
    "threads": {"symptoms"},
    "server": {"care", "model", "together"},
    "homes": set(),
    "cgroup": set(),
    "identity": {"care"},
    "bus": set(),
    "fork": {"care", "cgroup", "identity"},
    "units": {"bus", "care", "cgroup", "fork", "homes", "identity"},
    "launch": {
        *("care", "cgroup", "fork", "homes", "identity", "model", "together", "trust", "units"),
    },
    "store": {"care", "model", "trust"},
    "trust": set(),
    "config": {"model", "rules", "settings", "tables", "trust"},
    "profiles": {"care", "model", "traits"},
    "kept": set(),
    "kmsg": set(),
    "trail": set(),
    "admin": {"model"},
    "metrics": {"", "events", "model", "status", "uapi"},
    "log": {"events", "model", "status"},
    # L3: the shell; its edges come in by Protocol
    "lanes": set(),
    "starts": {"care", "events", "lanes", "model"},
    "ends": {"care", "events", "model", "starts"},
    "who": {"care", "model", "perform", "rules"},
    "perform": {"care", "ends", "events", "lanes", "model", "rules", "starts", "symptoms"},
    "pulse": {"events", "model", "perform", "symptoms", "uapi"},
    "unsaved": {"events"},
    "monitor": {
        *("ailing", "attempt", "care", "events", "model", "orders", "perform", "pulse"),
        *("recovery", "starts", "uapi", "unsaved", "who"),
    },
    # L4: composition
    "library": {"care", "config", "model", "profiles", "rules", "settings", "tables", "trust"},
    "desk": {"admin", "events", "library", "model", "monitor", "settings", "uapi"},
    "registering": {"admin", "config", "library", "settings", "store", "tables", "trust"},
    "news": {"chronicle", "kmsg", "store", "trail"},
    "daemon": {
        *("", "admin", "async_ring", "care", "chronicle", "config", "ctrl", "ctrl_worker", "desk"),
        *("discover", "events", "fork", "kept", "lanes", "launch", "library", "log", "metrics"),
        *("model", "monitor", "news", "perform", "rules", "server", "settings", "status", "store"),
        *("threads", "trust", "uapi"),
    },
    # The command line: a verb knows no other
    "verbs": {"config"},
    "verbs.ask": {"admin", "config", "model", "registering", "settings", "store", "verbs"},
    "verbs.run": {"config", "daemon", "store", "verbs"},
    "verbs.past": {"config", "page", "past", "store", "trail", "verbs"},
    "verbs.show": {"config", "page", "sheet", "verbs"},
    "verbs.tell": {"config", "explain", "foretell", "model", "status", "store", "verbs"},
    "cli": {
        *("", "config", "settings", "verbs"),
        *("verbs.ask", "verbs.past", "verbs.run", "verbs.show", "verbs.tell"),
    },
}

# What acts on the world has one home each.
HOMES = {
    "ctypes": {"uring"},
    "mmap": {"uring"},
    # Servers by fork; journalctl, asked by units; workers, and operators' commands.
    "subprocess": {"fork", "launch", "units"},
    "jeepney": {"bus", "units"},
    "psutil": {"server"},
    "pyroute2": {"discover"},
    "sqlite3": {"store"},
    "prometheus_client": {"metrics"},
    "argparse": {
        *("cli", "verbs"),
        *("verbs.ask", "verbs.past", "verbs.run", "verbs.show", "verbs.tell"),
    },
    "os.pidfd_open": {"server"},
    "signal.pidfd_send_signal": {"server"},
    "os.kill": set(),
    "os.system": set(),
    "os.fork": set(),
    "time.sleep": set(),
    "time.monotonic": {"verbs.tell", "daemon", "desk", "news"},
    "time.time": {"verbs.past", "verbs.show", "verbs.tell", "desk", "daemon", "news"},
    "sys.exit": set(),
}
PURE = (
    *("uapi", "model", "care", "events", "settings", "traits", "rules", "tables"),
    *("verdict", "pace", "attempt", "orders", "outage", "timers", "resume", "shared", "deaf"),
    *("recovery", "ailing", "symptoms", "foretell", "chronicle", "spans", "status", "explain"),
    *("page", "sheet", "past"),
)
HARMLESS = {
    *("__future__", "collections", "dataclasses", "enum", "errno", "string", "struct", "typing"),
    *("difflib", "fnmatch", "itertools", "re", "textwrap", "types", "ublkwatch"),
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


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stays_below_the_ceiling(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= CEILING
