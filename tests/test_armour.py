"""The armour, as far as this machine lets it be put on; tests/kernel has the rest."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from patience import PATIENCE_S, until

from ublkwatch import armour, outside
from ublkwatch.apart import Apart

MAPS = """\
55d0c0a00000-55d0c0a02000 r--p 00000000 fd:00 1048 /usr/bin/cat
55d0c0a02000-55d0c0a07000 r-xp 00002000 fd:00 1048 /usr/bin/cat
55d0c0b00000-55d0c0b21000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000001000 ---p 00000000 fd:00 77 /usr/lib/libc.so.6
7f0000001000-7f0000003000 rw-p 00001000 fd:00 77 /usr/lib/my lib.so (deleted)
7f0000003000-7f0000004000 rw-s 00000000 00:01 5 /dev/zero (deleted)
7f0000004000-7f0000005000 rw-s 00000000 00:0f 6 anon_inode:[io_uring]
7f0000005000-7f0000006000 r-xs 00000000 00:01 7 /memfd:gate (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
7ffd00100000-7ffd00101000 r-xp 00000000 00:00 0
"""
LOCK = """
import sys
from pathlib import Path
from ublkwatch import armour
mine = armour.Armour()
print(mine.lock() > 0, mine.missing)
sizes = {}
for line in Path("/proc/self/smaps").read_text().splitlines():
    words = line.split()
    if "-" in words[0]:
        name = words[5] if len(words) > 5 else ""
    elif words[0] in ("Size:", "Rss:", "Locked:"):
        sizes.setdefault(name, {}).setdefault(words[0], []).append(int(words[1]))
for name in (str(Path(sys.executable).resolve()), "libc.so"):
    (found,) = [each for key, each in sizes.items() if name in key]
    print(sum(found["Rss:"]) == sum(found["Size:"]))
"""


def test_what_is_mapped_from_files_is_found_data_and_constants_too() -> None:
    found = armour.file_mappings(MAPS)
    assert [(each.size, each.path) for each in found] == [
        (0x2000, "/usr/bin/cat"),
        (0x5000, "/usr/bin/cat"),
        (0x2000, "/usr/lib/my lib.so (deleted)"),
    ]
    assert found[1].address == 0x55D0C0A02000


class Myself:
    """A /proc/self."""

    def __init__(self, home: Path, *, capabilities: int, ids: str = "0 0 4294967295") -> None:
        self.home = home
        (home / "oom_score_adj").write_text("-17\n")
        (home / "uid_map").write_text(f"   {ids}\n")
        (home / "status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
        (home / "maps").write_text("")


@pytest.mark.parametrize(
    ("capabilities", "ids"), [(0, "0 0 4294967295"), (1 << 14, "0 1000 1"), (1 << 21, "0 1000 1")]
)
def test_who_may_not_lock_without_a_limit_does_not_and_says_so(
    tmp_path: Path, capabilities: int, ids: str
) -> None:
    # In a process of its own: limits are lowered for good.
    Myself(tmp_path, capabilities=capabilities, ids=ids)
    code = f"""
import resource
from pathlib import Path
from ublkwatch.armour import Armour
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
mine = Armour(Path({str(tmp_path)!r}))
print(mine.lock(), len(mine.missing), mine.missing[0])
print([line for line in open("/proc/self/status") if line.startswith("VmLck")])
"""
    said = python(code)
    assert said.startswith("0 1 memory is not locked (no CAP_IPC_LOCK, and RLIMIT_MEMLOCK is 1048")
    assert "LimitMEMLOCK=infinity; lock_memory = false" in said
    assert "0 kB" in said.splitlines()[1]


def test_what_may_not_be_done_is_named_once_and_nothing_fails(tmp_path: Path) -> None:
    Myself(tmp_path, capabilities=0)
    code = f"""
from pathlib import Path
from ublkwatch.armour import Armour
home = Path({str(tmp_path)!r})
mine = Armour(home)
(home / "oom_score_adj").unlink()
(home / "oom_score_adj").mkdir()  # cannot be written, by root either
mine.put_on()
print(*mine.missing, sep="\\n")
"""
    oom = python(code).splitlines()[-1]
    assert oom.startswith("oom_score_adj stays -17 (")
    assert oom.count("CAP_SYS_RESOURCE") == 1


@pytest.mark.parametrize(("before", "after"), [(0, -950), (-17, -950), (-1000, -1000), (300, -950)])
def test_the_oom_score_is_lowered_and_never_raised(tmp_path: Path, before: int, after: int) -> None:
    Myself(tmp_path, capabilities=0)
    (tmp_path / "oom_score_adj").write_text(f"{before}\n")
    python(
        "from pathlib import Path; from ublkwatch.armour import Armour\n"
        f"mine = Armour(Path({str(tmp_path)!r})); mine.put_on()\n"
        f"assert mine.usual_oom_score_adj == {before}"
    )
    assert (tmp_path / "oom_score_adj").read_text() == str(after)


def test_what_is_mapped_is_in_memory_whole() -> None:
    assert python(LOCK).splitlines() == ["True []", "True", "True"]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- apart ---------------------------------------------------------------------------------------


def test_work_that_hangs_keeps_nobody_waiting_not_even_the_end() -> None:
    code = """
import asyncio, threading
from ublkwatch.apart import Apart
async def main():
    asyncio.get_running_loop().set_default_executor(Apart())
    hung = [asyncio.create_task(asyncio.to_thread(threading.Event().wait)) for _ in range(100)]
    await asyncio.sleep(0)
    print(await asyncio.to_thread(lambda *words, sep: sep.join(words), "a", "b", sep="-"))
    try:
        await asyncio.to_thread(int, "x")
    except ValueError as error:
        print(error)
    hung[0].cancel()
asyncio.run(main())
"""
    assert python(code).splitlines() == ["a-b", "invalid literal for int() with base 10: 'x'"]


def test_an_answer_that_nobody_waits_for_is_lost_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    began, go, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go.wait(PATIENCE_S)
        over.set()

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(Apart())
        asked = asyncio.create_task(asyncio.to_thread(work))
        await until(began.is_set, "it is under way")
        asked.cancel()
        go.set()
        await until(over.is_set, "it is done")
        assert asked.cancelled()

    asyncio.run(main())
    assert caplog.text == ""


# --- outside -------------------------------------------------------------------------------------


def test_a_program_outside_is_any_victim_of_the_oom_killer_and_its_words_are_told() -> None:
    script = """
until grep -qx 0 /proc/$$/oom_score_adj; do sleep 0.1; done
echo "$1"; echo no >&2; exit 3
"""
    code = f"""
import asyncio
from ublkwatch import outside
open("/proc/self/oom_score_adj", "w").write("7")  # a lower one would need a capability
print(asyncio.run(outside.run(("/bin/sh", "-c", {script!r}, "x", "a  b"), output=True)))
"""
    assert python(code) == "(3, b'a  b\\n')\n"


def test_one_that_is_not_waited_for_any_more_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    async def main() -> None:
        command = ("/bin/sh", "-c", f"echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 600")
        running = asyncio.create_task(outside.run(command))
        await until(pid.exists, "it runs")
        running.cancel()
        await until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists(), "it was killed")

    asyncio.run(main())


def test_what_cannot_be_executed_is_an_oserror_that_says_why(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF, and nothing else")
    program.chmod(0o755)
    with pytest.raises(OSError, match="Exec format error"):
        asyncio.run(outside.run((str(program),)))


# --- beforehand ----------------------------------------------------------------------------------


def test_between_a_crash_and_the_line_nothing_is_imported_and_nothing_opened_but_programs(
    tmp_path: Path,
) -> None:
    script = Path(__file__).with_name("beforehand.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *did, last = done.stdout.splitlines()
    assert last == "done"
    # Programs are judged, one directory after the other, before they are executed.
    assert {"open /.", "open bin", "open true"} <= set(did)
    assert [line for line in did if line.startswith("import") or line.count("/") > 1] == []


# --- traces --------------------------------------------------------------------------------------


def test_a_trace_is_logged_without_reading_the_source(tmp_path: Path) -> None:
    source = tmp_path / "dead.py"
    source.write_text("def fail():\n    raise ValueError('why')\n")
    code = f"""
import logging, sys
from ublkwatch import log
sys.path.insert(0, {str(tmp_path)!r})
import dead
lines = log.Log()
sys.addaudithook(lambda event, arguments: print(*arguments) if event == "open" else None)
try:
    dead.fail()
except ValueError:
    logging.getLogger("ublkwatch").exception("a bug")
lines.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout == "", "nothing was opened"
    assert "ERROR a bug\n" in done.stderr
    assert f"  {source}, line 2, in fail\nValueError: why\n" in done.stderr
