"""Finding devices: fixture trees for sysfs, and real uevents."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest
from patience import until

from ublkwatch import discover
from ublkwatch.model import Traffic

BOOT = "5c1f"
LO = Path("/sys/class/net/lo/uevent")
SEQNUM = Path("/sys/kernel/uevent_seqnum")
TUN, TUNSETIFF, IFF_TUN_NO_PI = Path("/dev/net/tun"), 0x400454CA, 0x1001


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Three devices, of which two have disks."""
    for name in ("ublkc0", "ublkc7", "ublkc12", "ublkc", "ublkcx", "ublk-control", "ublkc3-old"):
        (tmp_path / "class/ublk-char" / name).mkdir(parents=True)
    for name, number in (("ublkb0", "41\n"), ("ublkb7", "9\n")):
        disk = tmp_path / "block" / name
        disk.mkdir(parents=True)
        (disk / "diskseq").write_text(number)
    return tmp_path


def test_devices_are_found_started_or_not_and_nothing_else(sysfs: Path) -> None:
    assert discover.dev_ids(sysfs) == {0, 7, 12}


def test_without_the_module_there_are_none(tmp_path: Path) -> None:
    assert discover.dev_ids(tmp_path) == set()


def test_every_device_is_present_with_the_life_of_its_disk(sysfs: Path) -> None:
    before = discover.present(sysfs)
    assert before.keys() == {0, 7, 12}
    assert before[12] is None
    assert before == discover.present(sysfs)
    # Made before the old one is gone: a file system gives numbers out again.
    (sysfs / "block/new").mkdir()
    (sysfs / "block/ublkb7").rename(sysfs / "block/old")
    (sysfs / "block/new").rename(sysfs / "block/ublkb7")
    after = discover.present(sysfs)
    assert after[0] == before[0]
    assert after[7] not in (before[7], None)


def test_without_the_module_nothing_is_present(tmp_path: Path) -> None:
    assert discover.present(tmp_path) == {}


def test_an_instance_names_boot_and_disk(sysfs: Path) -> None:
    assert discover.instance(0, BOOT, sysfs) == "5c1f/41"
    assert discover.instance(7, BOOT, sysfs) == "5c1f/9"


def test_a_device_without_a_disk_has_no_instance(sysfs: Path) -> None:
    assert discover.instance(12, BOOT, sysfs) is None


def test_the_same_id_with_another_disk_is_another_instance(sysfs: Path) -> None:
    before = discover.instance(0, BOOT, sysfs)
    (sysfs / "block/ublkb0/diskseq").write_text("42\n")
    assert discover.instance(0, BOOT, sysfs) == "5c1f/42" != before


def test_two_boots_are_two_instances_of_the_same_number(sysfs: Path) -> None:
    assert discover.instance(0, "a", sysfs) != discover.instance(0, "b", sysfs)


# --- traffic -------------------------------------------------------------------------------------


def test_traffic_is_what_is_in_flight_and_what_was_completed_of_every_kind(sysfs: Path) -> None:
    disk = sysfs / "block/ublkb0"
    (disk / "inflight").write_text("       2        3\n")
    counts = [100, 0, 0, 0, 20, 0, 0, 0, 6, 999, 999, 3, 0, 0, 0, 1, 0]
    (disk / "stat").write_text("".join(f"{count:9}" for count in counts) + "\n")
    assert discover.traffic(0, sysfs) == Traffic(6, 124, parked=1)
    (disk / "inflight").write_text("       5        3\n")  # a moment later
    assert discover.traffic(0, sysfs) == Traffic(6, 124, parked=0)
    (disk / "stat").write_text("\n")
    assert discover.traffic(0, sysfs) is None


def test_a_device_without_a_disk_has_no_traffic(sysfs: Path) -> None:
    assert discover.traffic(12, sysfs) is None


def test_every_disk_of_this_kernel_has_its_traffic() -> None:
    names = [path.name for path in Path("/sys/block").iterdir()]
    fields = {len((Path("/sys/block") / name / "stat").read_text().split()) for name in names}
    assert all(count >= 17 for count in fields), "the fields that are summed up are there"


# --- uevents -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "number", "last", "asks"),
    [
        ("/devices/virtual/block/ublkb0", 8, 7, True),
        ("/devices/virtual/ublk-char/ublkc0", 8, 7, True),
        ("/module/ublk_drv", 8, None, True),
        ("/devices/virtual/block/loop0", 8, 7, False),
        ("/devices/virtual/block/loop0", 8, None, False),
        ("/devices/virtual/block/loop0", 9, 7, True),
        ("/devices/virtual/block/loop0", 7, 7, False),
        ("", 0, 7, False),
    ],
)
def test_ublk_devices_and_lost_events_ask_for_a_look(
    path: str, number: int, last: int | None, *, asks: bool
) -> None:
    assert discover.asks_for_look(path, number, last) is asks


def cause_uevent() -> None:
    before = int(SEQNUM.read_text())
    try:
        LO.write_text("change")
    except PermissionError:
        pytest.skip("only root may cause a uevent")
    assert int(SEQNUM.read_text()) > before


def lose_uevents() -> None:
    """Cause uevents that nobody here hears: those of another network namespace's interface."""
    before = int(SEQNUM.read_text())
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    if done.returncode or int(SEQNUM.read_text()) == before:
        pytest.skip("no network namespace can be had here")


def test_a_gap_in_the_kernels_uevents_leads_to_a_look() -> None:
    async def main() -> None:
        looks: list[None] = []
        following = asyncio.create_task(discover.follow_uevents(lambda: looks.append(None)))

        def looked_after_a_gap() -> bool:
            if following.done():
                following.result()
            cause_uevent()
            lose_uevents()
            return bool(looks)

        await until(looked_after_a_gap, "a look for the events that were lost")
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following

    asyncio.run(main())


def test_more_events_than_the_socket_holds_lead_to_a_look() -> None:
    async def main() -> None:
        looks: list[None] = []
        following = asyncio.create_task(discover.follow_uevents(lambda: looks.append(None)))
        await until(lambda: looks, "the first look")
        for _ in range(3000):  # a socket holds some hundreds, and nobody reads meanwhile
            cause_uevent()
        await until(lambda: len(looks) > 1, "a look for the events that were lost")
        make_interface("ublk-test")
        heard = len(looks)
        await until(lambda: len(looks) > heard, "a look for one that came behind them")
        assert not following.done()
        following.cancel()

    asyncio.run(main())


def test_an_event_that_is_no_text_leads_to_a_look_and_to_no_end() -> None:
    """Whoever names network interfaces must not end us."""

    async def main() -> None:
        looks: list[None] = []
        following = asyncio.create_task(discover.follow_uevents(lambda: looks.append(None)))
        await until(lambda: looks, "the first look")
        make_interface("strange-\udcff")
        await until(lambda: len(looks) > 1 or following.done(), "a look")
        assert not following.done()
        following.cancel()

    asyncio.run(main())


def test_an_event_of_something_called_ublk_leads_to_a_look() -> None:
    """A network interface lends its name: it takes no driver of ours, and goes when closed."""

    async def main() -> None:
        looks: list[None] = []
        following = asyncio.create_task(discover.follow_uevents(lambda: looks.append(None)))

        def looked_after_an_event() -> bool:
            if following.done():
                following.result()
            make_interface("ublk-test")
            return bool(looks)

        await until(looked_after_an_event, "a look for the event")
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following

    asyncio.run(main())


def make_interface(name: str) -> None:
    """Let the kernel announce an interface of that name, and its going."""
    try:
        with TUN.open("r+b", buffering=0) as tun:
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", os.fsencode(name), IFF_TUN_NO_PI))
    except OSError as error:
        pytest.skip(f"no network interface can be made here: {error}")
