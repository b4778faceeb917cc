"""What a person at three in the morning is told, for every phase and every reason."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ublkwatch import orders
from ublkwatch.explain import explain
from ublkwatch.foretell import Times
from ublkwatch.model import (
    Ailment,
    Armed,
    Attach,
    DevInfo,
    Exhausted,
    Generation,
    Handoff,
    Illness,
    Loss,
    Order,
    Phase,
    Policy,
    Reason,
    Record,
    RecoveryMode,
    Remedy,
    ServerId,
)
from ublkwatch.spans import span
from ublkwatch.uapi import DevFlags, DevState

NOW, WALL = 5000.0, 1_700_000_000.0
TIMES = Times(NOW, WALL, lambda wall: f"T{wall - WALL:+.0f}")
REISSUE = DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE
FLAGS = {
    RecoveryMode.NONE: DevFlags(0),
    RecoveryMode.PLAIN: DevFlags.USER_RECOVERY,
    RecoveryMode.REISSUE: REISSUE,
    RecoveryMode.FAIL_IO: DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_FAIL_IO,
}
SERVER = ServerId(1000, 5, "boot")


UP: dict[str, Any] = {"phase": Phase.DRAINING, "spawned_at": 4999.0}


def info(state: DevState | int = DevState.QUIESCED, flags: DevFlags = REISSUE) -> DevInfo:
    return DevInfo(3, state, flags, 2, 128, 524288, 1000)


DOWN = Record(
    dev_id=3,
    instance="boot/1",
    phase=Phase.BACKOFF,
    reason=Reason.DIED_BEFORE_READY,
    detail="exit status 1: no file",
    since=NOW - 1,
    wake=NOW + 3.2,
    info=info(),
    seq=2,
    attempts=2,
    failures=(NOW - 900, NOW - 2, NOW - 1),
    detected_by="pidfd",
    marks=(("lost", NOW - 4), ("draining", NOW - 4), ("stopping", NOW - 2), ("backoff", NOW - 1)),
)
HEALTHY = Record(
    dev_id=3,
    instance="boot/1",
    phase=Phase.WATCHING,
    since=NOW - 7200,
    info=info(DevState.LIVE),
    server=SERVER,
)
ME = "uid 0 (root), pid 9: new disk"
HELD = replace(DOWN, phase=Phase.HELD, reason=Reason.HELD, detail=ME, held=True, held_by=ME)
HELD = replace(HELD, wake=None)
FAILED = replace(DOWN, phase=Phase.FAILED, wake=None, attempts=5)


def told(record: Record, policy: Policy | None = None, **how: Any) -> dict[str, list[str]]:
    """Return the sentences by their label; "head" has the first two lines."""
    lines = explain(record, policy or Policy(), TIMES, **how).splitlines()
    found: dict[str, list[str]] = {"head": lines[:2]}
    label = ""
    for line in lines[2:]:
        label = line[:9].strip().removesuffix(":") or label
        found.setdefault(label, []).append(line[9:])
    return found


def following(record: Record, **policy: Any) -> str:
    """Return what is said to come next, in one line."""
    return " | ".join(told(record, Policy(**policy))["Next"])


def verbs(record: Record, policy: Policy | None = None) -> set[str]:
    return {line.split()[1] for line in told(record, policy).get("You can", [])}


# --- one device in full --------------------------------------------------------------------------


def test_a_device_between_two_attempts_in_full() -> None:
    assert (
        explain(DOWN, Policy(), TIMES)
        == """\
ublkb3: backoff, QUIESCED, for 1.0 s
ublkwatch is running
What:    an attempt failed, and another one follows after a pause
Why:     the server ended before it was ready (exit status 1: no file)
Tried:   2 attempts, since its server was lost 4.0 s ago (T-4; its process ended)
             +0.000 s  lost
             +0.000 s  draining
             +2.000 s  stopping
             +2.000 s  an attempt failed
             +3.000 s  backoff
             +3.000 s  an attempt failed
Next:    the next attempt in 3.2 s; failed so far: 3 of 5
I/O:     what was in flight is sent again to the new server; what came since waits
You can: ublkwatch hold 3        nothing is begun or ended until it is released; --for 30m ends \
that by itself
         ublkwatch retry 3       begin now, with a new budget of attempts
         ublkwatch recover 3     begin now, whatever it waits for
         ublkwatch forget 3      take the hands off this life of the device; it is not recovered
More:    docs/recovery.md, DIED_BEFORE_READY"""
    )


def test_whether_somebody_is_there_to_act_is_said_first() -> None:
    assert told(DOWN)["head"][1] == "ublkwatch is running"
    down = told(DOWN, running=False, written_at=WALL - 600)["head"][1]
    assert down.startswith("ublkwatch is NOT RUNNING since T-600, 10 min ago: until it is started")
    assert "NOT RUNNING: until" in told(DOWN, running=False)["head"][1]


# --- what comes next, and when -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "policy", "says"),
    [
        ({"phase": Phase.WATCHING}, {}, "should its server be lost, it is recovered at once"),
        ({"phase": Phase.WATCHING}, {"grace_s": 300}, "it is recovered after 5 min"),
        ({"phase": Phase.WATCHING, "held": True}, {}, "nothing is done while it is held"),
        ({"phase": Phase.GRACE}, {}, "recovery begins in 3.2 s, unless somebody else"),
        (UP, {}, "once the new server is ready and the kernel has let go"),
        (UP, {}, "given up in 29 s"),  # ready_timeout_s, since 1 s
        ({"phase": Phase.DRAINING}, {}, "once the new server is started, and ready and the kernel"),
        ({"phase": Phase.DRAINING, "agreed": 1}, {}, "given up in 10 min"),  # queue_timeout_s
        (
            {"phase": Phase.DRAINING, "agreed": 1, "quiet_since": NOW - 2, "holders": "pid 7"},
            {"generation": Generation.G2, "handoff": Handoff.DELEGATED},
            "once nobody has the character device open (pid 7); given up in 58 s",
        ),
        (
            {"phase": Phase.DRAINING, "ready": True, "candidate": SERVER, "holders": "pid 7"},
            {},
            "goes out once the kernel has let go of the old server (pid 7); given up in 89 s",
        ),
        ({"phase": Phase.DRAINING, "agreed": 1}, {"attach": Attach.START}, "once all is read"),
        ({"phase": Phase.STARTING, "holders": "pid 7"}, {}, "given up in 89 s; EBUSY so far: pid"),
        ({"phase": Phase.ATTACHING}, {}, "LIVE, once the new server has fetched every request"),
        ({"phase": Phase.ATTACHING}, {}, "it is ended in 14 s"),
        ({"phase": Phase.ATTACHING}, {"handoff": Handoff.DELEGATED}, "server is started, and has"),
        (
            {"phase": Phase.ATTACHING, "spawned_at": NOW - 1},
            {"handoff": Handoff.DELEGATED},
            "it is ended in 44 s",
        ),
        (
            {"phase": Phase.STOPPING, "reason": Reason.HOOK_LATER},
            {"attempts_max": 3},
            "when all has ended, another attempt follows",
        ),
        (
            {"phase": Phase.FAILED, "shared": True, "candidate": SERVER},
            {},
            "nothing until process 1000 ends; then this device is recovered with the others",
        ),
        ({"phase": Phase.PROBATION}, {}, "if it is still LIVE in 3.2 s, that is believed"),
        ({"phase": Phase.STOPPING}, {}, "when all has ended, another attempt follows"),
        ({"phase": Phase.STOPPING}, {"attempts_max": 3}, "when all has ended, it is given up"),
        (
            {"phase": Phase.STOPPING, "lined": True},
            {"generation": Generation.G2},
            "when all has ended, it is given up",
        ),
        (
            {"phase": Phase.STOPPING, "reason": Reason.PERMANENT_EXIT},
            {},
            "when all has ended, it is given up",
        ),
        ({"phase": Phase.STOPPING, "held": True}, {}, "when all has ended, it is held"),
        ({"phase": Phase.STOPPING, "then": Phase.OBSERVED}, {}, "when all has ended, it is obs"),
        ({"phase": Phase.BACKOFF}, {}, "the next attempt in 3.2 s; failed so far: 3 of 5"),
        ({"phase": Phase.DECIDING}, {}, "exit status says (10: try again, 20: STOP_DEV, else: w"),
        ({"phase": Phase.DECIDING}, {}, "without an answer it stays failed, in 3.2 s"),
        ({"phase": Phase.FAILING}, {}, "STOP_DEV, once the server is known to be dead"),
        ({"phase": Phase.FAILING, "pending": True}, {}, "the kernel answers STOP_DEV; if that"),
        ({"phase": Phase.GONE}, {}, "nothing: its record is forgotten"),
    ],
)
def test_what_comes_next(changes: dict[str, Any], policy: dict[str, Any], says: str) -> None:
    assert says in following(replace(DOWN, **changes), **policy)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (FAILED, "nothing by itself: it waits for `ublkwatch retry 3`"),
        (replace(FAILED, stopped=True), "nothing: create the device again by its own program"),
        (replace(FAILED, reason=Reason.NOT_QUIESCED), "unless the kernel lets go"),
        (replace(FAILED, reason=Reason.INTERNAL_ERROR), "restart ublkwatch, and please report"),
        (replace(FAILED, held=True), "`ublkwatch retry 3` would be refused: it is held; release"),
        (
            replace(FAILED, reason=Reason.NO_ANSWER),
            "then `ublkwatch retry 3`; where that does not help, a reboot is needed",
        ),
        (HELD, "nothing: it waits for `ublkwatch release 3`"),
        (
            replace(HELD, held_until=NOW + 7300),
            "nothing until the hold ends, in 2 h; then it is recovered",
        ),
        (
            replace(HELD, reason=Reason.SHUTDOWN, held=False),
            "nothing, for the host shuts down; if it does not after all: `ublkwatch recover 3`",
        ),
        (replace(HELD, held=False), "nothing by itself: it waits for `ublkwatch recover 3`"),
    ],
)
def test_what_lasts_says_what_it_waits_for(record: Record, says: str) -> None:
    assert says in following(record)


def test_half_attached_is_refused_where_it_could_crash_the_kernel() -> None:
    half = replace(FAILED, reason=Reason.HALF_ATTACHED)
    assert "`ublkwatch retry 3` would be refused" in following(half, generation=Generation.G2)
    assert "could crash the kernel" in following(half, generation=Generation.G2)
    assert verbs(half, Policy(generation=Generation.G2)) == {"hold", "forget"}
    # Where the kernel's kind is not known the answer is that of the stricter one.
    assert verbs(half, Policy(generation=Generation.UNKNOWN)) == {"hold", "forget"}
    assert verbs(half) == {"hold", "retry", "recover", "forget"}


@pytest.mark.parametrize(
    ("reason", "state", "says"),
    [
        (Reason.NO_RECOVERY_FLAG, DevState.LIVE, "create it again, with UBLK_F_USER_RECOVERY"),
        (Reason.NO_SPEC, DevState.LIVE, "`ublkwatch register 3 -- COMMAND...` does"),
        (Reason.FOREIGN, DevState.LIVE, "it is left to who restarts its server"),
        (Reason.UNTRUSTED, DevState.LIVE, "nothing, until that can be trusted"),
        (Reason.NO_FEATURES, DevState.LIVE, "a newer kernel is needed"),
        (Reason.NO_VISIBLE_SERVER, DevState.LIVE, "watched as soon as a process that can be seen"),
        (Reason.UNKNOWN_STATE, 9, "a newer ublkwatch is needed"),
        (Reason.NEVER_SEEN_LIVE, DevState.QUIESCED, "it waits for `ublkwatch recover 3`"),
        (Reason.FORGOTTEN, DevState.QUIESCED, "it waits for `ublkwatch recover 3`"),
        (Reason.FORGOTTEN, DevState.LIVE, "it waits for `ublkwatch recover 3`"),
        (None, DevState.LIVE, "it is judged at the next look"),
    ],
)
def test_a_device_that_is_only_observed_says_what_is_missing(
    reason: Reason | None, state: DevState | int, says: str
) -> None:
    observed = replace(HEALTHY, phase=Phase.OBSERVED, reason=reason, info=info(state))
    assert says in following(observed)


# --- when I/O has waited long enough -------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (replace(FAILED, give_up_at=NOW + 240), "STOP_DEV in 4 min if nothing changes: hold_tim"),
        (
            replace(DOWN, phase=Phase.ATTACHING, give_up_at=NOW + 5),
            "STOP_DEV in 5.0 s, unless this brings it back: hold_timeout_s",
        ),
        (
            replace(HELD, give_up_at=NOW + 240),
            "STOP_DEV in 4 min, but not while nothing may be ended: hold_timeout_s",
        ),
        (
            replace(HELD, overdue=True),
            "I/O has waited for hold_timeout_s: STOP_DEV ends it when the hold ends, unless reco",
        ),
        (
            replace(FAILED, overdue=True, held=True),
            "I/O has waited for hold_timeout_s: STOP_DEV ends it when the hold ends",
        ),
        (
            replace(DOWN, phase=Phase.STARTING, overdue=True),
            "I/O has waited for hold_timeout_s: STOP_DEV ends it, unless this brings it back",
        ),
    ],
)
def test_when_stop_dev_follows_is_foretold(record: Record, says: str) -> None:
    assert says in following(record)


def test_where_nothing_waits_no_stop_dev_is_foretold() -> None:
    for record in (HEALTHY, DOWN, FAILED, HELD, replace(FAILED, stopped=True, overdue=True)):
        assert "STOP_DEV" not in following(record)


# --- why, what was tried, who holds it, what it means for I/O ------------------------------------


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.WATCHING])
def test_every_reason_is_told_with_its_particulars_and_where_to_read_on(
    phase: Phase, reason: Reason
) -> None:
    sentences = told(replace(DOWN, phase=phase, reason=reason))
    assert sentences["Why"] == [f"{reason.value} (exit status 1: no file)"]
    assert sentences["More"] == [f"docs/recovery.md, {reason.name}"]


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_a_meaning_of_its_own(phase: Phase) -> None:
    meanings = {tuple(told(replace(DOWN, phase=each))["What"]) for each in Phase}
    assert len(meanings) == len(Phase)
    assert told(replace(DOWN, phase=phase))["What"][0]


def test_a_stopped_device_is_not_told_as_one_whose_io_waits() -> None:
    stopped = told(replace(FAILED, stopped=True, info=info(DevState.DEAD)))
    assert stopped["What"] == ["ublkwatch gave up: it was stopped, and what waited ended in errors"]
    assert stopped["I/O"] == ["all of it has ended in errors; the disk is removed"]
    assert "retry" not in verbs(replace(FAILED, stopped=True))


def test_how_the_server_ended_is_said_where_it_is_known() -> None:
    for how, says in (("SIGKILL", "its process ended: SIGKILL)"), ("unknown", "process ended)")):
        assert told(replace(DOWN, loss=Loss(SERVER, how)))["Tried"][0].endswith(says)


def test_a_long_timeline_shows_how_it_began_and_how_it_went_on() -> None:
    marks = tuple((f"mark{n}", NOW - 100 + n) for n in range(64))
    tried = told(replace(DOWN, marks=marks, failures=()))["Tried"]
    assert [line.split()[-1] for line in tried[1:3]] == ["mark0", "more"]
    assert tried[2].strip() == "... 48 more"
    assert tried[-1].split() == ["+63.000", "s", "mark63"]
    assert len(tried) == 18


def test_a_recovered_device_tells_of_its_last_recovery() -> None:
    marks = (("lost", NOW - 100), ("probation", NOW - 99.958))
    record = replace(HEALTHY, recoveries=3, last_held_s=0.042, marks=marks, attempts=1)
    tried = told(record)["Tried"]
    assert tried[0] == "3 recoveries so far; at the last one I/O was held for 0.042 s"
    assert tried[1].startswith("1 attempt, since its server was lost 100 s ago (T-100")
    assert "Tried" not in told(HEALTHY)


AILS = Illness(Ailment.STALL, "it sleeps", NOW - 45)


def test_a_stalled_server_in_full() -> None:
    record = replace(HEALTHY, ill=AILS)
    said = told(record)
    assert said["Why"] == [
        "stalled: its server has requests and completes none (it sleeps); since T-45"
    ]
    assert said["More"] == ["docs/recovery.md, STALL"]
    assert said["I/O"][0].startswith("what its server has hangs; when its server dies what is in")
    assert "recover" in verbs(record)


def test_what_comes_next_of_a_server_that_ails() -> None:
    kill = {"on_stall": Remedy.KILL}
    ails = replace(HEALTHY, ill=AILS)
    assert following(ails) == (
        "nothing by itself, as on_stall says: `ublkwatch recover 3` ends its server, and the "
        "device is recovered"
    )
    assert following(ails, **kill) == "its server is ended, and the device is recovered"
    assert following(replace(ails, held=True), **kill).startswith("nothing while it is held; then")
    spent = replace(ails, failures=(NOW,) * 5, since=NOW - 46)
    assert following(spent, **kill).startswith("nothing by itself: after 5 failures to end it did")
    doomed = replace(ails, ill=replace(AILS, condemned=True))
    assert following(doomed).startswith("its server was sent SIGKILL, and when that has ended")
    dead = replace(ails, ill=replace(AILS, kind=Ailment.DEAD_QUEUE))
    assert following(dead) == "its server is ended, and the device is recovered"


@pytest.mark.parametrize("generation", [Generation.G2, Generation.G3])
def test_that_the_kernel_may_take_its_time_is_said_where_it_does(generation: Generation) -> None:
    said = told(replace(HEALTHY, ill=AILS), Policy(generation=generation))["I/O"][0]
    assert said.endswith("; on this kernel up to 30 s later") is (generation is Generation.G2)


def test_who_holds_it_and_until_when() -> None:
    assert told(HELD)["Held"] == [f"by {ME}, until it is released"]
    assert told(replace(HELD, held_until=NOW + 600))["Held"] == [
        f"by {ME}, until T+600 (in 10 min)"
    ]
    assert told(replace(HELD, held_by=""))["Held"] == ["by an operator, until it is released"]
    assert "Held" not in told(DOWN)


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [
        (RecoveryMode.NONE, "the disk is removed", "the disk goes with its server"),
        (RecoveryMode.PLAIN, "in flight ends with EIO; what comes then waits", "came since waits"),
        (RecoveryMode.REISSUE, "is sent again, and all I/O waits", "is sent again to the new"),
        (RecoveryMode.FAIL_IO, "what comes then with EREMOTEIO", "ends with EREMOTEIO at once"),
    ],
)
def test_what_it_means_for_io(mode: RecoveryMode, before: str, after: str) -> None:
    assert before in told(replace(HEALTHY, info=info(DevState.LIVE, FLAGS[mode])))["I/O"][0]
    assert after in told(replace(DOWN, info=info(DevState.QUIESCED, FLAGS[mode])))["I/O"][0]
    assert told(replace(DOWN, info=None))["I/O"][0].startswith("not known here")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-1, "0.0 s"), (0.04, "0.0 s"), (3.21, "3.2 s"), (10, "10 s"), (119, "119 s")),
        *((120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172799, "48 h"), (172800, "2 days")),
        (float("nan"), "0.0 s"),
    ],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert span(seconds) == text


# --- laws ----------------------------------------------------------------------------------------

moments = st.floats(0, 1e6) | st.just(NOW)
maybe = st.none() | moments
servers = st.none() | st.just(SERVER)
marks = st.lists(st.tuples(st.sampled_from([each.value for each in Phase]), moments), max_size=70)
infos = st.builds(
    info, st.sampled_from([*DevState, 9]), st.sampled_from([*FLAGS.values(), DevFlags(1 << 40)])
)
records = st.builds(
    Record,
    dev_id=st.integers(0, 1 << 20),
    instance=st.just("boot/1"),
    phase=st.sampled_from(Phase),
    reason=st.none() | st.sampled_from(Reason),
    detail=st.text(max_size=20),
    since=moments,
    wake=maybe,
    info=st.none() | infos,
    server=servers,
    candidate=servers,
    spawned_at=maybe,
    ready=st.booleans(),
    holders=st.text(max_size=5),
    agreed=st.integers(0, 3),
    quiet_since=maybe,
    free_since=maybe,
    armed=st.sampled_from(Armed),
    lined=st.booleans(),
    pending=st.booleans(),
    over=st.booleans(),
    shared=st.booleans(),
    then=st.none() | st.sampled_from(Phase),
    failures=st.lists(moments, max_size=12).map(tuple),
    attempts=st.integers(0, 200),
    held=st.booleans(),
    held_until=maybe,
    held_by=st.text(max_size=10),
    give_up_at=maybe,
    overdue=st.booleans(),
    stopped=st.booleans(),
    detected_by=st.sampled_from(["", "pidfd", "poll", "startup", "stall", "else"]),
    marks=marks.map(tuple),
    recoveries=st.integers(0, 9),
    last_held_s=maybe,
)
policies = st.builds(
    Policy,
    generation=st.sampled_from(Generation),
    has_spec=st.booleans(),
    handoff=st.sampled_from(Handoff),
    attach=st.sampled_from(Attach),
    on_exhausted=st.sampled_from(Exhausted),
    grace_s=st.floats(0, 100),
    attempts_max=st.integers(1, 10),
)


@settings(max_examples=300, deadline=None)
@given(records, policies, st.booleans(), maybe)
def test_explain_keeps_its_laws(
    record: Record,
    policy: Policy,
    running: bool,  # noqa: FBT001
    written_at: float | None,
) -> None:
    text = explain(record, policy, TIMES, running=running, written_at=written_at)
    assert f"ublkb{record.dev_id}: {record.phase.value}" in text
    coming = text.rpartition("\nNext:")[2].partition("\nI/O:")[0]
    assert coming.strip(), "something is always said of what comes"
    if record.phase in (Phase.FAILED, Phase.HELD):
        assert "attempt" not in coming, "no attempt follows by itself"
    strict = policy
    if policy.generation is Generation.UNKNOWN:
        strict = replace(policy, generation=Generation.G2)
    offered = re.findall(r"ublkwatch (\w+) \d+ {2}", text.rpartition("\nI/O:")[2])
    allowed = [each.value for each in Order if not orders.objection(record, each, strict)]
    assert offered == allowed, "what can be done is what is not refused"
    if record.held:
        assert "\nHeld: " in text
