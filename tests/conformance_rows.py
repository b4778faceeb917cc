"""The conformance table: what each generation of the driver answers, situation by situation.

G2 is Linux 6.7-6.14 (Debian's 6.12 in the lab), G3 Linux 6.15 on (7.3 in the lab). The sources are
sections of the driver research, which read the driver and reproduced what it claims; docs/kernel.md
keeps what ublkwatch relies on. Rows that cost a boot are in conformance_own_boot.py.
"""

from __future__ import annotations

from conformance_lost_rows import LOST_ROWS
from conformance_steps import (
    DELETE,
    END,
    G2,
    G3,
    START,
    STOP,
    Add,
    Attach,
    By,
    Cancel,
    Close,
    Kill,
    Later,
    Only,
    Row,
    Serve,
    Shows,
    Tell,
    back,
    crashed,
    live,
)

from ublkwatch.uapi import DevFlags

STARTS = (
    Row(
        "without the flag nothing is recovered",
        "2.3, 3.3",
        (
            Add(DevFlags(0)),
            Tell(START, "EINVAL"),
            Serve("old"),
            Tell("START_DEV", pid="old"),
            Tell(START, "EINVAL"),
            Shows("LIVE", "old"),
            Kill("old"),
            Shows("DEAD", "-1"),
            Tell(START, "EINVAL"),
        ),
    ),
    Row(
        "START of a device that was never started",
        "2.3",
        (Add(), Shows("DEAD", "-1"), Tell(START, By("EINVAL", "EBUSY")), Shows("DEAD", "-1")),
    ),
    Row(
        "START while LIVE, and a second opener",
        "2.3, 3.7",
        (
            *live(),
            Tell(START, "EBUSY"),
            Serve("stranger", "opened", "open EBUSY"),
            Shows("LIVE", "old"),
        ),
    ),
    Row(
        "START while a stranger has the character device open",
        "2.3, 3.7",
        (
            *crashed(),
            Serve("stranger", "opened"),
            Tell(START, "EBUSY"),
            Shows("QUIESCED", By("old", "-1")),
            Close("stranger"),
            Tell(START),
            *back("new"),
        ),
    ),
    Row(
        "a recovery; START a second time before END",
        "2.3, 3, T2",
        (
            *crashed(),
            Tell(START),
            Shows("QUIESCED", By("old", "-1")),
            Tell(START, By("EINVAL", "0")),
            *back("new"),
            Tell(START, "EBUSY"),
        ),
    ),
    Row(
        "a device recovers as often as its server dies",
        "2.3, T57",
        (
            *crashed(queues=2),
            Tell(START),
            *back("new"),
            Kill("new"),
            Shows("QUIESCED", By("new", "-1")),
            Tell(START),
            *back("third"),
        ),
    ),
    Row(
        "START while END is pending",
        "2.3",
        (
            *crashed(),
            Tell(START),
            Serve("new", "nothing"),
            Tell(END, "waits", pid="new"),
            Tell(START, By("EINVAL", "0")),
            Later(END, "waits"),
            Attach("new"),
            Later(END, "0"),
            Shows("LIVE", "new"),
        ),
    ),
    Row(
        "START after STOP_DEV of a device without server",
        "2.3, 2.6",
        (*crashed(), Tell(STOP), Shows("DEAD", "-1"), Tell(START, "EBUSY")),
    ),
    Row(
        "START after STOP_DEV, when START was sent before it",
        "2.3",
        (
            *crashed(),
            Tell(START),
            Tell(STOP),
            Shows("DEAD", "-1"),
            Tell(START, By("EINVAL", "EBUSY")),
        ),
    ),
    Row(
        "START after STOP_DEV of a served device; DEL_DEV waits for the server",
        "2.3, 2.6, 3.8",
        (
            *live(),
            Tell(STOP),
            Shows("DEAD", "-1"),
            Tell(START, "EBUSY"),
            Tell(DELETE, "waits"),
            Tell("GET_DEV_INFO"),
            Kill("old"),
            Later(DELETE, "0"),
            Tell("GET_DEV_INFO", "ENODEV"),
        ),
    ),
    Row(
        "a device that is not there",
        "2.1",
        tuple(
            Tell(command, "ENODEV", pid="init")
            for command in ("GET_DEV_INFO", "GET_PARAMS", START, END, STOP, DELETE)
        ),
    ),
)

ENDS = (
    Row(
        "END waits for the last tag, and can be cancelled",
        "2.4, 3.6",
        (
            *crashed(queues=2),
            Tell(START),
            Serve("new", "nothing"),
            Tell(END, "waits", pid="new"),
            Cancel(END),
            Later(END, "EINTR"),
            Tell(END, "waits", pid="new"),
            Attach("new", "opened"),
            Later(END, "waits"),
            Attach("new", "mapped"),
            Later(END, "waits"),
            Attach("new", "some tags"),
            Later(END, "waits"),
            Attach("new", "one queue"),
            Later(END, "waits"),
            Shows("QUIESCED", By("old", "-1")),
            Attach("new"),
            Later(END, "0"),
            Shows("LIVE", "new"),
        ),
    ),
    Row(
        "END without START",
        "2.4, T1",
        (
            *crashed(),
            Tell(END, By("0", "waits"), pid="old"),
            # Whose completion was the former server's: nobody serves, and START is refused.
            Only(G2, (Shows("LIVE", "old", stays=True), Tell(START, "EBUSY"), Tell(STOP))),
            Only(G2, (Shows("DEAD", "-1"),)),
            Only(G3, (Shows("QUIESCED", "-1"), Cancel(END), Later(END, "EINTR"))),
            Only(G3, back("new")),
        ),
    ),
    Row(
        "END with another's pid",
        "2.4, 4, T11, T14",
        (
            *crashed(),
            Tell(START),
            Serve("new"),
            Tell(END, By("0", "EINVAL"), pid="init"),
            Shows(By("LIVE", "QUIESCED"), By("init", "-1")),
            Only(G3, (Tell(END, pid="new"), Shows("LIVE", "new"))),
        ),
    ),
    Row(
        "START_DEV with another's pid",
        "2.5, 4",
        (
            Add(),
            Serve("old"),
            Tell("START_DEV", By("0", "EINVAL"), pid="init"),
            Only(G3, (Tell("START_DEV", pid="old"),)),
            Shows("LIVE", By("init", "old")),
            Tell("START_DEV", "EEXIST", pid="old"),
        ),
    ),
    Row(
        "END while LIVE",
        "2.4, T19",
        (
            *live(),
            Tell(END, "EBUSY", pid="old"),
            Tell(END, By("EBUSY", "EINVAL"), pid="init"),
            Shows("LIVE", "old"),
        ),
    ),
    Row(
        "two ENDs at a time",
        "3.6",
        (
            *crashed(),
            Tell(START),
            Serve("new", "nothing"),
            Tell(END, "waits", pid="new", label="first"),
            Tell(END, "waits", pid="new", label="second"),
            Attach("new"),
            Later("first", "0|EBUSY"),
            Later("second", "0|EBUSY"),
            Shows("LIVE", "new"),
        ),
        law=False,
    ),
    Row(
        "END after STOP_DEV, with the new server there",
        "2.4, T18",
        (
            *crashed(),
            Tell(START),
            Serve("new", "opened"),
            Tell(END, "waits", pid="new"),
            Tell(STOP),
            Shows("DEAD", "-1"),
            Later(END, By("waits", "EBUSY")),
            Only(G2, (Attach("new"), Later(END, "EBUSY"), Shows("DEAD", "-1"))),
        ),
    ),
    Row(
        "END after STOP_DEV, with no server there",
        "2.4, 3.6, T18",
        (
            *crashed(),
            Tell(START),
            Serve("new", "nothing"),
            Tell(END, "waits", pid="new"),
            Tell(STOP),
            Shows("DEAD", "-1"),
            Later(END, "waits"),
            Cancel(END),
            Later(END, "EINTR"),
        ),
    ),
    Row(
        "the new server ends before it opened anything",
        "3.5",
        (
            *crashed(),
            Tell(START),
            Serve("new", "nothing"),
            Kill("new"),
            Tell(START, By("EINVAL", "0")),  # and on G2 it is good all the same
            *back("third"),
        ),
    ),
    Row(
        "the new server ends when it had only opened, while END is pending",
        "3.5",
        (
            *crashed(),
            Tell(START),
            Serve("new", "opened"),
            Tell(END, "waits", pid="new"),
            Kill("new"),
            Later(END, "waits"),
            Serve("third"),
            Later(END, By("0", "EINVAL")),  # it names a pid that is not the opener's
            Only(G3, (Tell(END, pid="third"),)),
            Shows("LIVE", By("new", "third")),
        ),
    ),
    Row(
        "the new server ends when it was attached, before END",
        "3.5, T5",
        (
            *crashed(),
            Tell(START),
            Serve("new"),
            Kill("new"),
            # Wait until the kernel has let go of it: END would else find G3 ready, and the pid
            # nobody's (EINVAL); G2 would be LIVE, and a moment later QUIESCED.
            Serve("stranger", "opened"),
            Close("stranger"),
            Tell(END, By("0", "waits"), pid="new"),
            # LIVE under a dead server, and nothing but STOP_DEV helps.
            Only(G2, (Shows("LIVE", "new", stays=True), Tell(START, "EBUSY"), Tell(STOP))),
            Only(G2, (Shows("DEAD", "-1"),)),
            Only(G3, (Serve("third"), Later(END, "EINVAL"))),
            Only(G3, (Tell(END, pid="third"), Shows("LIVE", "third"))),
        ),
    ),
)

ROWS = (*STARTS, *ENDS, *LOST_ROWS)
