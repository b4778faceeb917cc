"""The rest of the conformance table: servers lost half attached, STOP_DEV, reads, flags."""

from __future__ import annotations

from conformance_steps import (
    ALIVE,
    DELETE,
    END,
    FAIL_IO,
    G2,
    G3,
    PARTIAL,
    PLAIN,
    REISSUE,
    START,
    STOP,
    Add,
    Attach,
    By,
    Cancel,
    Close,
    Fork,
    Hush,
    Kill,
    Later,
    Only,
    Read,
    Row,
    Serve,
    Shows,
    Tell,
    back,
    crashed,
    live,
)

from ublkwatch.uapi import DevFlags

# ublk_ch_mmap() compares the bare address of the mm, which may be used again: on 6.12.117 such a
# server mapped once, and its FETCH said EINVAL. So the rows' later servers run before that death.
BY_CHANCE = "on G2 a server started after that death can map all the same, by chance"

HALF_ATTACHED = (
    Row(
        "a server that had only mapped its queues is killed",
        "3.5, T4",
        (
            *crashed(),
            Tell(START),
            Serve("new", "mapped"),
            Serve("third", "nothing"),
            Serve("fourth", "nothing"),
            Kill("new"),
            Tell(START, By("EINVAL", "0")),
            Attach("third", "all", By("mmap EINVAL", "0")),
            Only(G3, (Tell(END, pid="third"), Shows("LIVE", "third"))),
            # The driver still compares with the dead server's memory, so no later one can map ...
            Only(G2, (Kill("third"), Attach("fourth", "all", "mmap EINVAL"), Kill("fourth"))),
            Only(G2, (Tell(STOP), Shows("DEAD", "-1"))),
        ),
        note=BY_CHANCE,
    ),
    Row(
        "a server that had fetched some tags is killed",
        "3.5, T4",
        (
            *crashed(),
            Tell(START),
            Serve("new", "some tags"),
            Kill("new"),
            Tell(START, By("EINVAL", "0")),
            # On G2 the device stays "open", by nobody.
            Serve("third", "all", By("open EBUSY", "0")),
            Only(G3, (Tell(END, pid="third"), Shows("LIVE", "third"))),
            Only(G2, (Tell(STOP), Shows("DEAD", "-1"), Serve("fourth", "opened"))),
        ),
        complains=PARTIAL,
    ),
    Row(
        "a server that had fetched one of two queues is killed",
        "3.5, T4",
        (
            *crashed(queues=2),
            Tell(START),
            Serve("new", "one queue"),
            Serve("third", "nothing"),
            Kill("new"),
            Shows("QUIESCED", By("old", "-1"), stays=True),
            Only(G3, (Tell(START),)),
            Attach("third", "all", By("mmap EINVAL", "0")),
            Tell(END, By("waits", "0"), pid="third"),
            Only(G2, (Tell(STOP), Shows("DEAD", "-1"))),
        ),
        complains=PARTIAL,
        note="on G2 another START oopses: a row with a boot of its own; " + BY_CHANCE,
    ),
)

GOING = (
    Row(
        "a forked child keeps the character device open",
        "3.4, 3.7, T8",
        (
            *live(),
            Fork("old", "child"),
            Kill("old"),
            Shows(By("QUIESCED", "LIVE"), By("old", "-1"), stays=True),
            Tell(START, "EBUSY"),
            Close("child"),
            Shows("QUIESCED", By("old", "-1")),
            Tell(START),
            *back("new"),
        ),
    ),
    Row(
        "a server closes its rings and stays",
        "3.4",
        (
            *live(),
            Close("old", "rings"),
            Shows(By("QUIESCED", "LIVE"), "old", stays=True),
            Tell(START, "EBUSY"),
            Close("old", "device"),
            Shows("QUIESCED", "old"),
            Tell(START),
            *back("new"),
        ),
        complains=ALIVE,
    ),
    Row(
        "FAIL_IO",
        "3.1, T28",
        (*crashed(FAIL_IO), Tell(START), *back("new")),
        note="Linux 6.13 and 6.14 are G2 and know FAIL_IO",
    ),
    Row(
        "a saturated queue does not hide its server's end",
        "3.1, 3.2, T10",
        (
            *live(),
            Read("before"),
            Hush("old"),
            Read("first", "waits"),
            Read("second", "waits"),
            Kill("old"),
            Shows("QUIESCED", "-1"),
            Tell(START),
            *back("new"),
            Later("first", "0"),
            Later("second", "0"),
        ),
        generations=(G3,),
        note="on G2 it does, for 30 s: a row with a boot of its own",
    ),
    Row(
        "STOP_DEV waits for a server that answers nothing; only GET_DEV_INFO does not",
        "3.8, 6.2, T24",
        (
            *live(),
            Read("before"),
            Hush("old"),
            Read("read", "waits"),
            Tell(STOP, "waits"),
            Tell("GET_DEV_INFO"),
            Shows("LIVE", "old"),
            Tell(START, "waits"),
            Tell("GET_PARAMS", "waits"),
            Tell("GET_DEV_INFO"),
            Kill("old"),
            Later(STOP, "0"),
            Later("GET_PARAMS", "0"),
            Later(START, "EBUSY"),
            Later("read", "EIO"),
            Shows("DEAD", "-1"),
        ),
    ),
    Row(
        "DEL_DEV waits for a pending END",
        "2.6, 3.6, T17",
        (
            *crashed(),
            Tell(START),
            Tell(END, "waits", pid="old"),
            Tell(DELETE, "waits"),
            Tell("GET_DEV_INFO"),
            Shows("DEAD", "-1"),
            Add(says="EEXIST"),
            Cancel(END),
            Later(END, "EINTR"),
            Later(DELETE, "0"),
            Tell("GET_DEV_INFO", "ENODEV"),
        ),
    ),
    Row(
        "unprivileged devices are not recoverable",
        "1.6, T29",
        (
            Add(REISSUE | DevFlags.UNPRIVILEGED_DEV, granted=DevFlags.UNPRIVILEGED_DEV),
            Tell(START, "EINVAL"),
            # Without the path of its node nobody, not even root, is told anything of it.
            Tell("GET_DEV_INFO", "EINVAL"),
        ),
    ),
)

READS = (
    Row(
        "REISSUE: what was in flight is sent again, what comes later waits",
        "3.3",
        (
            *live(),
            Read("before"),
            Hush("old"),
            Read("in flight", "waits"),
            Kill("old"),
            Shows("QUIESCED"),
            Read("later", "waits"),
            Later("in flight", "waits"),
            Tell(START),
            *back("new"),
            Later("in flight", "0"),
            Later("later", "0"),
        ),
    ),
    Row(
        "plain recovery: what was in flight fails, what comes later waits",
        "3.3, T38",
        (
            *live(PLAIN),
            Read("before"),
            Hush("old"),
            Read("in flight", "waits"),
            Kill("old"),
            Later("in flight", "EIO"),
            Shows("QUIESCED"),
            Read("later", "waits"),
            Tell(START),
            *back("new"),
            Later("later", "0"),
        ),
    ),
    Row(
        "FAIL_IO: what was in flight fails, what comes later fails at once",
        "3.3, T28",
        (
            *live(FAIL_IO),
            Read("before"),
            Hush("old"),
            Read("in flight", "waits"),
            Kill("old"),
            Later("in flight", "EIO"),
            Shows(By("QUIESCED", "FAIL_IO")),
            Read("later", By("waits", "EREMOTEIO")),
            Tell(START),
            *back("new"),
            Only(G2, (Later("later", "0"),)),
            Read("after"),
        ),
    ),
    Row(
        "STOP_DEV ends what waits on a device without server",
        "2.6, 3.3, T37",
        (
            *live(),
            Read("before"),  # G3 scans for partitions after START_DEV, and opens wait for that
            Kill("old"),
            Shows("QUIESCED", By("old", "-1")),
            Read("read", "waits"),
            Tell(STOP),
            Later("read", "EIO"),
            Shows("DEAD", "-1"),
        ),
    ),
)

WORDS = (
    Row(
        "the driver's features",
        "0.1",
        (Tell("GET_FEATURES", By("0x1fe", "0x1fffff")),),
        law=False,
        note="Generation.of() relies on bit 0 alone",
    ),
    Row(
        "combinations of recovery flags",
        "2.7",
        (
            Add(DevFlags.USER_RECOVERY_REISSUE, says=By("0", "EINVAL")),
            Only(G2, (Tell(DELETE),)),
            Add(DevFlags.USER_RECOVERY_FAIL_IO, says=By("0", "EINVAL"), granted=DevFlags(0)),
            Only(G2, (Tell(DELETE),)),
            Add(REISSUE | DevFlags.USER_RECOVERY_FAIL_IO, says=By("0", "EINVAL"), granted=REISSUE),
        ),
        law=False,
    ),
    Row(
        "parameters are fixed once there is a disk",
        "2.8",
        (
            *live(),
            Tell("SET_PARAMS", "EACCES"),
            Kill("old"),
            Shows("QUIESCED"),
            Tell(START),
            Tell("SET_PARAMS", "EACCES"),
            Tell("GET_PARAMS"),
            *back("new"),
        ),
    ),
)

LOST_ROWS = (*HALF_ATTACHED, *GOING, *READS, *WORDS)
