"""Rows that cost a kernel or half a minute, each with a boot of its own in the lab.

``python tests/conformance_own_boot.py`` boots and prints what happened. The lab's kernels panic
when they oops; elsewhere the mutex stays locked and the device is lost until the next boot.
"""

from __future__ import annotations

from conformance_steps import (
    G2,
    START,
    Hush,
    Kill,
    Read,
    Row,
    Serve,
    Shows,
    Tell,
    back,
    crashed,
    live,
)

OWN_BOOT = (
    Row(
        "START after one of two queues was fetched by a server that was killed",
        "3.5, T4",
        (
            *crashed(queues=2),
            Tell(START),
            Serve("new", "one queue"),
            Kill("new"),
            Shows("QUIESCED", "old", stays=True),
            # put_task_struct(NULL) in ublk_ctrl_start_recovery(), with the mutex held
            Tell(START, "waits"),
            Tell("GET_PARAMS", "waits"),
            Tell("GET_DEV_INFO"),
        ),
        generations=(G2,),
        own_boot=True,
    ),
    Row(
        "a saturated queue hides its server's end for 30 s",
        "3.1, 3.2, T10",
        (
            *live(),
            Read("before"),
            Hush("old"),
            Read("first", "waits"),
            Read("second", "waits"),
            Kill("old"),
            Shows("LIVE", "old", stays=True),
            Tell(START, "EBUSY"),
            Shows("QUIESCED", "old"),
            Tell(START),
            *back("new"),
        ),
        generations=(G2,),
        own_boot=True,
    ),
)
