"""`ublkwatch doctor`: what stands in the way on this machine, and the way out of each.

`look()` asks the world, once; each check is a function of what it has seen, in the order of CHECKS.
Nothing is changed, and no device is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ublkwatch import __version__, kernels
from ublkwatch.driver import gate
from ublkwatch.examined import Facts
from ublkwatch.finding import Finding, Level
from ublkwatch.host import OURS, systemd_root
from ublkwatch.model import STANDBY_TAG, DevInfo, Generation, RecoveryMode
from ublkwatch.uapi import DevState

_INIT_PID_NS = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_SYSTEMD_MIN = 240  # Type=exec
_AS_ROOT = "run this as root"
_STALE_S = 15.0  # of the status document, at the most
CAPABILITIES = {
    "CAP_SYS_ADMIN": (21, Level.BAD, "every control command of ublk"),
    "CAP_SYS_PTRACE": (19, Level.WARN, "seeing who has a device open"),
    "CAP_KILL": (5, Level.WARN, "ending servers of other users"),
    "CAP_SETUID": (7, Level.WARN, "starting servers as the users that they had"),
    "CAP_SYS_RESOURCE": (24, Level.WARN, "giving servers their limits"),
}


def _ok(about: str, what: str) -> Finding:
    return Finding(Level.OK, about, what)


def kernel(facts: Facts) -> Iterator[Finding]:
    """Name the kernel's known bugs; the version alone speaks, which a distribution may not tell."""
    found = list(kernels.bugs(facts.release))
    for bug in found:
        fixed = ".".join(map(str, bug.until))
        fix = f"Linux {fixed} or later, or a distribution's kernel that has the fix"
        yield Finding(Level.WARN, "kernel", f"{facts.release}: {bug.what}", fix)
    if not found:
        yield _ok("kernel", f"{facts.release}: nothing bad is known of it")


def module(facts: Facts) -> Iterator[Finding]:
    """Look for ublk_drv: loaded, to be had, or not built."""
    home = facts.root / f"lib/modules/{facts.release}"
    if (facts.root / "sys/module/ublk_drv").exists():
        yield _ok("module", "ublk_drv is loaded")
        return
    known = "".join(_read(home / name) for name in ("modules.dep", "modules.builtin"))
    if "ublk_drv.ko" in known:
        fix = "modprobe ublk_drv; for every boot: echo ublk_drv > /etc/modules-load.d/ublk_drv.conf"
        yield Finding(Level.BAD, "module", "ublk_drv is not loaded", fix)
    else:
        what = f"the kernel {facts.release} has no ublk_drv (CONFIG_BLK_DEV_UBLK)"
        yield Finding(Level.BAD, "module", what, "a kernel that has it, or its package of modules")


def node(facts: Facts) -> Iterator[Finding]:
    """Look for /dev/ublk-control, and whether it is ours to open."""
    path = facts.root / "dev/ublk-control"
    if not path.exists():
        if (facts.root / "sys/module/ublk_drv").exists():
            what = f"{path} is missing, though the driver is loaded: a container's /dev?"
            yield Finding(Level.BAD, "node", what, "give the container /dev/ublk-control")
    elif not os.access(path, os.R_OK | os.W_OK):
        what, fix = f"{path}: we may not open it", "run as root; in a container, allow the device"
        if facts.blind:  # the daemon is not who looks
            yield Finding(Level.UNSEEN, "node", what, _AS_ROOT)
        else:
            yield Finding(Level.BAD, "node", what, fix)
    else:
        yield _ok("node", f"{path} is there")


def capabilities(facts: Facts) -> Iterator[Finding]:
    """Look for what root has, and a container's root may not have: of the daemon, where it runs."""
    if facts.blind and not facts.running:
        yield Finding(Level.UNSEEN, "capability", "what root may do here", _AS_ROOT)
        return
    status = _read(facts.root / f"proc/{_daemon(facts)}/status")
    text = re.search(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    has = int(text[1], 16) if text else 0
    missing = [name for name, (bit, _, _) in CAPABILITIES.items() if not has >> bit & 1]
    if facts.settings and facts.settings.launcher == "systemd":
        missing = [name for name in missing if name != "CAP_SETUID"]  # systemd has it
    for name in missing:
        _, level, what = CAPABILITIES[name]
        yield Finding(level, "capability", f"no {name}: {what} needs it", "give it that, or root")
    if not missing:
        yield _ok("capability", "all that are needed")
    if _read(facts.root / f"proc/{_daemon(facts)}/uid_map").split()[:2] not in ([], ["0", "0"]):
        what = "a user namespace, where the driver takes nobody for root"
        yield Finding(Level.BAD, "capability", what, "run in the host's user namespace")


def _daemon(facts: Facts) -> str:
    """Return the process that is looked at: the daemon, or ourselves where none runs."""
    return str(facts.pid) if facts.running else "self"


def io_uring(facts: Facts) -> Iterator[Finding]:
    """Name the gate that keeps us from io_uring."""
    if facts.ring_error is not None:
        yield Finding(Level.BAD, "io_uring", *gate(facts.ring_error, facts.root))
    else:
        yield _ok("io_uring", "a ring was set up")


def driver(facts: Facts) -> Iterator[Finding]:
    """Say which rules the driver follows."""
    if facts.ring_error is not None:
        yield Finding(Level.UNSEEN, "driver", "nobody can be asked without io_uring")
    elif facts.driver_error:
        what, _, fix = facts.driver_error.partition("; try: ")
        yield Finding(Level.UNSEEN, "driver", f"GET_FEATURES: {what}", fix)
    elif (generation := Generation.of(facts.features)) is Generation.UNKNOWN:
        what = "no GET_FEATURES: ublkwatch only observes"
        yield Finding(Level.BAD, "driver", what, "Linux 6.7 or later")
    else:
        yield _ok("driver", f"features {facts.features or 0:#x}, {generation.name}'s rules")


def limits(facts: Facts) -> Iterator[Finding]:
    """Look at the limits of the daemon, or at our own where none runs."""
    text = _read(facts.root / f"proc/{_daemon(facts)}/limits")
    found = dict(re.findall(r"^(Max .+?) {2,}(\S+)", text, re.MULTILINE))
    if not found:
        yield Finding(Level.UNSEEN, "limits", "those of the daemon cannot be read", _AS_ROOT)
        return
    files, needed = found.get("Max open files", "0"), 512 + 8 * len(facts.devices)
    if files != "unlimited" and int(files) < needed:
        what = f"open files: {files}, where {needed} may be needed"
        yield Finding(Level.WARN, "limits", what, f"LimitNOFILE={max(4096, needed)} for ublkwatch")
    else:
        memory = found.get("Max locked memory", "?")
        yield _ok("limits", f"open files: {files}, locked memory: {memory}")


def namespace(facts: Facts) -> Iterator[Finding]:
    """Look whether the kernel's pids are ours."""
    try:
        ours = str((facts.root / "proc/self/ns/pid").readlink())
    except OSError as error:
        yield Finding(Level.UNSEEN, "pid namespace", str(error.strerror))
        return
    if ours == _INIT_PID_NS:
        yield _ok("pid namespace", "the host's")
    else:
        what = "not the host's: servers outside of it cannot be seen"
        yield Finding(Level.BAD, "pid namespace", what, "hostPID: true, or --pid=host")


def systemd(facts: Facts) -> Iterator[Finding]:
    """Say who starts servers, and whether systemd is fit for it."""
    kind = facts.settings.launcher if facts.settings else "auto"
    level = Level.BAD if kind == "systemd" else Level.WARN
    here = (facts.root / "run/systemd/system").exists()
    if kind == "fork":
        unit = "; use KillMode=process in its unit" if here else ""
        yield _ok("launcher", f'"fork": servers are ublkwatch\'s own children{unit}')
    elif not here and _read(facts.root / "proc/1/comm").strip() == "systemd":
        what = "systemd is process 1, and not to be seen: servers are children, and die with us"
        fix = "give the container the host's /run/systemd/system and /run/dbus"
        yield Finding(level, "launcher", what, fix)
    elif not here:
        if kind == "systemd":
            yield Finding(
                level, "launcher", "systemd is not this machine's init", 'launcher = "auto"'
            )
        else:
            yield _ok("launcher", "no systemd here: servers are ublkwatch's own children")
    elif isinstance(facts.systemd, OSError):
        what = f"systemd does not answer on the system bus: {facts.systemd}"
        yield Finding(level, "launcher", what, 'start dbus, or set launcher = "fork"')
    else:
        number = int((re.match(r"\d+", facts.systemd) or ["0"])[0])
        if number < _SYSTEMD_MIN:
            what = f"systemd {facts.systemd} is older than {_SYSTEMD_MIN}"
            yield Finding(level, "launcher", what, 'launcher = "fork"')
        else:
            yield _ok("launcher", f"systemd {facts.systemd}: servers are units of it")


def directories(facts: Facts) -> Iterator[Finding]:
    """Look whether ours can be written, and lie where they should."""
    if facts.settings is None:
        return
    for key in ("runtime_dir", "state_dir"):
        path: Path = getattr(facts.settings, key)
        there = next(each for each in (path, *path.parents) if os.access(each, os.F_OK))
        if not os.access(there, os.W_OK | os.X_OK):
            level = Level.BAD if os.geteuid() == 0 else Level.UNSEEN
            fix = f"another {key}, or one that root can write" if level is Level.BAD else _AS_ROOT
            yield Finding(level, "directories", f"{there} cannot be written ({key})", fix)
        elif key == "runtime_dir" and (kind := _filesystem(facts, there)) not in ("tmpfs", ""):
            what = f"{path} is on {kind}: what is written there with each step belongs on a tmpfs"
            yield Finding(Level.WARN, "directories", what, "runtime_dir below /run")
        else:
            yield _ok("directories", f"{path} can be written")
        if key == "runtime_dir":
            yield from _shared(facts, path, there)


def _shared(facts: Facts, path: Path, there: Path) -> Iterator[Finding]:
    """Look whether servers that systemd starts find what we have in the runtime directory."""
    host = systemd_root(facts.settings.launcher if facts.settings else "auto", facts.root)
    if host == OURS:
        return
    try:
        same = there.samefile(host / there.relative_to("/"))
    except FileNotFoundError:
        same = False
    except OSError as error:
        what = f"{host}: {error.strerror}: nobody can judge what systemd would run"
        yield Finding(Level.BAD, "directories", what, "CAP_SYS_PTRACE, and the host's processes")
        return
    if not same:
        what = f"{path} is another one for servers, which systemd starts: none would be READY"
        yield Finding(Level.BAD, "directories", what, f"mount the host's {path} at the same place")


def configuration(facts: Facts) -> Iterator[Finding]:
    """Say whether the daemon would take its configuration."""
    worse = [each for each in facts.config if each.level is not Level.OK]
    yield from worse
    if not worse:
        yield from facts.config


def daemon(facts: Facts) -> Iterator[Finding]:
    """Say whether ublkwatch runs, since when, and whether it works."""
    if not facts.running:
        what = "ublkwatch is not running: no crash is recovered"
        yield Finding(Level.BAD, "daemon", what, "systemctl start ublkwatch, or: ublkwatch run")
        return
    written = facts.document.get("written_at")
    age_s = None if written is None else facts.wall - written
    poll_s = facts.settings.poll_interval_s if facts.settings else 1.0
    if age_s is None or age_s > max(_STALE_S, 5 * poll_s):
        since = "never" if age_s is None else f"{age_s:.0f} s ago"
        what = f"process {facts.pid} holds the lock, and wrote its status {since}: it hangs?"
        yield Finding(Level.BAD, "daemon", what, "see its log; restart it: servers live on")
    else:
        yield _ok("daemon", f"process {facts.pid} runs, since {facts.age}")
    if facts.version and facts.version != __version__:
        what = f"version {facts.version} runs, {__version__} is installed"
        yield Finding(Level.WARN, "daemon", what, "restart it: servers live on")


def devices(facts: Facts) -> Iterator[Finding]:
    """Look for devices whose I/O waits, and for those that nobody would bring back."""
    known = {each["dev_id"]: each for each in facts.document.get("devices", [])}
    well = 0
    for dev_id, info in sorted(facts.devices.items()):
        name = f"ublkb{dev_id}"
        if isinstance(info, OSError):
            yield Finding(Level.UNSEEN, name, str(info))
            continue
        found = _device(facts, name, info, known.get(dev_id))
        well += found is None
        if found is not None:
            yield found
    if well:
        yield _ok("devices", f"{well} would be recovered, or need it not")


def _device(
    facts: Facts, name: str, info: DevInfo, seen: dict[str, object] | None
) -> Finding | None:
    waits = info.state in (DevState.QUIESCED, DevState.FAIL_IO)
    cared = facts.running and seen is not None and seen.get("care") is not None
    why = f"`ublkwatch explain {name}` says why"
    if waits and not facts.running:
        what = f"{info.state.name}, and nobody is there to recover it"  # type: ignore[union-attr]
        return Finding(Level.BAD, name, what, "start ublkwatch")
    if waits and not cared:
        what = "its server is lost, its I/O waits, and it is in nobody's care"
        fix = f"ublkwatch register {name} -- COMMAND...; then ublkwatch recover {name}"
        return Finding(Level.BAD, name, what, fix)
    if waits and seen is not None and seen.get("phase") == "failed":
        return Finding(Level.BAD, name, f"it was given up: {seen.get('explanation')}", why)
    if info.state is not DevState.LIVE or not facts.running:
        return None
    if RecoveryMode.of(info.flags) is RecoveryMode.NONE:
        what = "created without UBLK_F_USER_RECOVERY: it is lost with its server"
        return Finding(Level.WARN, name, what, "create it anew with recovery, if that matters")
    if not cared:
        what = "in nobody's care: a crash of its server would not be recovered"
        return Finding(Level.WARN, name, what, why)
    return None


def strays(facts: Facts) -> Iterator[Finding]:
    """Look for servers that ublkwatch started, and that serve nothing."""
    if facts.blind:
        yield Finding(Level.UNSEEN, "servers", "others' processes cannot be seen", _AS_ROOT)
        return
    shown = facts.document.get("devices", [])
    known = {each["dev_id"]: each["phase"] for each in shown}
    used = {each.get(key) for each in shown for key in ("candidate_pid", "standby_pid")}
    idle = ("watching", "observed", "failed", "held", None)
    found = False
    for tag, pids in sorted(facts.tagged.items()):
        names = " ".join(map(str, sorted(pids)))
        if tag.startswith(STANDBY_TAG):  # while nobody runs they wait for who comes
            over = facts.running and used.isdisjoint(pids)
            what = f"standby {tag} is nobody's, and its processes live: {names}"
        else:
            phase = known.get(int(tag.partition("-")[0])) if facts.running else None
            over = phase in idle
            what = f"attempt {tag} is over, and its processes live: {names}"
        if over and facts.serving.isdisjoint(pids):
            found = True
            yield Finding(Level.WARN, "servers", what, f"kill {names}")
    if not found:
        yield _ok("servers", "none that ublkwatch started serves nothing")


def sited(facts: Facts) -> Iterator[Finding]:
    """Look for what ublkwatch itself needs, and would have to bring back first."""
    for what in facts.sited:
        fix = "move it to another disk; docs/safety.md says what may happen"
        yield Finding(Level.BAD, "placement", f"{what}: lost with that device's server", fix)
    if not facts.sited:
        yield _ok("placement", "nothing that ublkwatch needs lies on a ublk device")


Check = Callable[[Facts], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    kernel,
    module,
    node,
    capabilities,
    io_uring,
    driver,
    limits,
    namespace,
    systemd,
    directories,
    configuration,
    daemon,
    devices,
    strays,
    sited,
)


def examine(facts: Facts) -> list[Finding]:
    """Run all checks."""
    return [finding for check in CHECKS for finding in check(facts)]


def _filesystem(facts: Facts, path: Path) -> str:
    """Return the type of the file system that a directory is on."""
    best, kind = "", ""
    for line in _read(facts.root / "proc/self/mountinfo").splitlines():
        words = line.split()
        with contextlib.suppress(ValueError, IndexError):
            where, found = words[4], words[words.index("-") + 1]
            inside = path.is_relative_to(where)
            if inside and len(where) >= len(best):
                best, kind = where, found
    return kind


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
