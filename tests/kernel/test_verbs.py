"""Every verb over the real driver, by whoever may ask, with the daemon up and down.

Each ends with the exit code of its table, and what it cannot do it says in one line: what, why, and
what to do. These lines are kept, as pages are: see test_pages.py.
"""

from __future__ import annotations

import contextlib
import grp
import importlib
import os
import pkgutil
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from captures import Captures
from manual import verbs_of
from supervisor import SERVER, Supervisor

import ublkwatch
from ublkwatch import cli
from ublkwatch.verbs import Exit

if TYPE_CHECKING:
    from conftest import Servers

GROUP = "disk"
NOBODY = 65534
OK, DOWN, NO, REFUSED = Exit.OK, Exit.NOT_RUNNING, Exit.NO_PERMISSION, Exit.REFUSED
STATE, UNHEALTHY, UNAVAILABLE = Exit.STATE, Exit.UNHEALTHY, Exit.UNAVAILABLE
Codes = tuple[Exit | None, Exit, Exit]
# What is asked; how that ends for root, for a member of admin_group and for another user while the
# daemon runs; and while it does not.
TABLE: dict[str, tuple[str, Codes, Codes]] = {
    "status": ("", (OK, OK, OK), (DOWN, DOWN, DOWN)),
    "explain": ("ublkb0", (OK, OK, NO), (DOWN, DOWN, NO)),
    "history": ("", (OK, NO, NO), (OK, NO, NO)),
    "events": ("", (OK, OK, OK), (DOWN, DOWN, DOWN)),
    "hold": ("ublkb0", (OK, OK, NO), (DOWN, DOWN, DOWN)),
    "release": ("ublkb0", (OK, OK, NO), (DOWN, DOWN, DOWN)),
    "retry": ("ublkb0", (REFUSED, REFUSED, NO), (DOWN, DOWN, DOWN)),
    "recover": ("ublkb0 --dry-run", (REFUSED, REFUSED, NO), (DOWN, DOWN, DOWN)),
    "forget": ("ublkb0 --dry-run", (OK, OK, NO), (DOWN, DOWN, DOWN)),
    "stop": ("ublkb0 --dry-run", (OK, OK, NO), (OK, NO, NO)),
    "drill": ("ublkb0 --dry-run", (OK, NO, NO), (DOWN, NO, NO)),
    "register": ("ublkb9 -- /bin/true", (OK, REFUSED, NO), (OK, NO, NO)),
    "registered": ("", (OK, NO, NO), (OK, NO, NO)),
    "unregister": ("ublkb9", (OK, REFUSED, NO), (OK, NO, NO)),
    "reload": ("", (OK, OK, NO), (DOWN, DOWN, DOWN)),
    "doctor": ("", (OK, OK, OK), (UNHEALTHY, UNHEALTHY, UNHEALTHY)),
    "features": ("", (OK, NO, NO), (OK, NO, NO)),
    "version": ("", (OK, OK, OK), (OK, OK, OK)),
    "check-config": ("", (OK, OK, OK), (OK, OK, OK)),
    # The guest has no systemd.
    "install-systemd": ("", (UNAVAILABLE, NO, NO), (UNAVAILABLE, NO, NO)),
    "run": ("", (STATE, NO, NO), (None, NO, NO)),  # None: that is the daemon of this test
}
PAGES = ("status", "explain", "events", "doctor")  # they have something to show all the same


@dataclass(frozen=True)
class Who:
    name: str
    uid: int
    groups: tuple[int, ...] = ()

    def become(self) -> None:
        os.setgroups(self.groups)
        os.setgid(self.uid)
        os.setuid(self.uid)


PEOPLE = (
    Who("root", 0),
    Who("member", NOBODY, (grp.getgrnam(GROUP).gr_gid,)),
    Who("other", NOBODY),
)


def run(who: Who, *argv: str) -> tuple[int, str, str]:
    """Run the command line as somebody; return its exit code, and what it wrote.

    In a fork, which has no start to pay for, and all modules: others than root may be unable to
    read this checkout, or Python.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (pid := os.fork()):
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
                who.become()
                code = cli.main([*argv])
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:  # noqa: BLE001 - the test shall see it
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), err.read()


@pytest.fixture
def supervisor(server: Servers) -> Iterator[Supervisor]:
    """Be ready to start one whose directories others than root can come to."""
    for module in pkgutil.walk_packages(ublkwatch.__path__, "ublkwatch."):
        if "__main__" not in module.name and ".demo" not in module.name:
            importlib.import_module(module.name)
    sysconfig.get_paths()  # imports late, too
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        command = [*SERVER, *server.target("null")]
        made = Supervisor(home, {0: command}, top=f'admin_group = "{GROUP}"')
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(made.kill)
            yield made


def test_the_table_has_every_verb() -> None:
    assert TABLE.keys() == verbs_of(cli.parser())[0].keys()


def test_every_verb_ends_as_it_should_for_everybody_with_the_daemon_up_and_down(
    server: Servers, supervisor: Supervisor
) -> None:
    server()
    supervisor.start()
    supervisor.watching()
    captures = Captures(supervisor)
    amiss: list[str] = []
    told = ["while it runs\n", *asked(supervisor, amiss, up=True)]
    supervisor.stop()
    told += ["\nwhile it does not run\n", *asked(supervisor, amiss, up=False)]
    captures.keep("errors", "".join(told))
    assert not amiss, "\n".join(amiss)
    captures.compared()


def asked(supervisor: Supervisor, amiss: list[str], *, up: bool) -> Iterator[str]:
    """Have everybody try every verb; return what they were told that could not do it."""
    for number, who in enumerate(PEOPLE):
        for verb, (words, while_up, while_down) in TABLE.items():
            if (wanted := (while_up if up else while_down)[number]) is None:
                continue
            option = ("--config", str(supervisor.config))
            code, out, err = run(who, verb, *option, *words.split())
            case = f"{who.name}, {'up' if up else 'down'}: {verb} {words}"
            if code != wanted:
                amiss.append(f"{case}: exit {code}, not {wanted}: {out}{err}")
            elif code != OK and verb not in PAGES:
                if out or not re.fullmatch(r"ublkwatch: [^;\n]+: [^;\n]+; [^\n]+\n", err):
                    amiss.append(f"{case}: is not one line with a way out: {out}{err}")
            elif err and not re.fullmatch(r"ublkwatch: [^\n]+; [^\n]+\n", err):
                amiss.append(f"{case}: says as well: {err}")
            if err:
                told = err.replace(str(supervisor.home), "HOME")
                yield f"{who.name:<6}  {code:>2}  {told}"
