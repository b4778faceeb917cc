"""The machine, fact by fact: the managed hand-off. Rules 1, 2, 3, 4, 6, 7, 9."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from stories import BOOT, INFO, NEW, OLD, OTHER, Story

from ublkwatch import orders
from ublkwatch.events import (
    AttemptOver,
    Cancel,
    EndAttempt,
    EndReplied,
    Event,
    FindHolders,
    HoldersFound,
    InfoMissing,
    InfoRead,
    Kill,
    ReadInfo,
    Ready,
    SendEnd,
    SendStart,
    ServerExited,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    Watch,
    Woken,
    WriteLine,
)
from ublkwatch.model import (
    Armed,
    Generation,
    Loss,
    Order,
    Phase,
    Policy,
    Reason,
    Record,
)
from ublkwatch.recovery import delayed, step
from ublkwatch.status import explanation
from ublkwatch.uapi import DevFlags, DevState

# --- one crash, from end to end ------------------------------------------------------------------


def test_a_crash_is_recovered_in_the_order_of_the_design(story: Story) -> None:
    assert story.tell(story.read(DevState.LIVE, OLD)) == [Watch(OLD)]
    assert story.tell(ServerExited(OLD, "SIGKILL")) == [Spawn(1), ReadInfo()]
    assert story.tell(story.read(DevState.QUIESCED)) == []
    assert story.tell(Spawned(1, NEW)) == [Watch(NEW)]
    assert story.tell(Ready(1)) == [SendStart(1)]
    assert story.record.armed is Armed.SENT
    assert story.tell(StartReplied(1, 0)) == [WriteLine(1), SendEnd(1, NEW.pid)]
    assert (story.record.armed, story.record.lined) == (Armed.YES, True)
    assert story.tell(EndReplied(1, 0), after_s=0.5) == [ReadInfo()]
    assert story.record.phase is Phase.PROBATION
    story.tell(story.read(DevState.LIVE, NEW))
    assert story.record.phase is Phase.PROBATION  # too early to believe it
    story.sleep()
    story.tell(story.read(DevState.LIVE, NEW))
    assert (story.record.phase, story.record.server) == (Phase.WATCHING, NEW)
    assert (story.record.recoveries, story.record.last_held_s) == (1, 0.5)
    assert story.record.detected_by == "pidfd"


def test_the_new_server_may_be_ready_before_the_kernel_let_go(story: Story) -> None:
    story.draining().tell(story.read(DevState.LIVE), Spawned(1, NEW), Ready(1))
    assert story.record.phase is Phase.DRAINING
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(1)]


def test_while_the_kernel_drains_it_is_asked_again_and_ever_less_often(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW), Ready(1))
    pauses = []
    for _ in range(200):
        before = story.now
        assert ReadInfo() in story.sleep()
        pauses.append(story.now - before)
        story.tell(story.read(DevState.LIVE))
    assert pauses[0] <= 0.01
    assert pauses == sorted(pauses)
    assert max(pauses) == story.policy.drain_poll_max_s
    assert story.wishes.count(FindHolders(1)) == 1  # it has taken long enough to ask who it is
    story.tell(HoldersFound(1, "/dev/ublkc0 is held by process 7 (cat)"))
    assert "process 7 (cat)" in explanation(story.record)


def test_once_the_kernel_let_go_it_is_not_asked_any_more(story: Story) -> None:
    """Polling would take the CPU that the new server needs to come up."""
    story.draining().tell(Spawned(1, NEW), story.read(DevState.QUIESCED))
    assert story.sleep() == []
    assert story.record.wake == story.record.since + story.policy.ready_timeout_s
    assert story.tell(Ready(1)) == [SendStart(1)]


def test_a_server_that_is_not_ready_has_the_cpu_and_one_that_is_waits_for_nobody(
    story: Story,
) -> None:
    story.draining().tell(Spawned(1, NEW))
    assert story.sleep() == [ReadInfo()]
    idle_s = story.record.wake - story.now if story.record.wake else 0.0
    story.tell(story.read(DevState.LIVE), Ready(1))
    assert story.record.wake == story.now, "only the kernel's word is missing"
    assert story.sleep() == [ReadInfo()]
    assert story.record.wake is not None
    assert story.record.wake - story.now < idle_s / 5
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(1)]


def test_a_process_that_was_ready_before_we_heard_of_it_waits_for_nobody(story: Story) -> None:
    story.draining().tell(Ready(1), Spawned(1, NEW))
    assert story.record.wake == story.now


def test_while_start_is_busy_the_holder_is_named_and_the_failure_names_it_too(
    story: Story,
) -> None:
    story.starting()
    assert story.sleep() == [FindHolders(1)]
    story.tell(HoldersFound(1, "no visible holder of /dev/ublkc0"))
    assert "no visible holder" in explanation(story.record)
    story.tell(StartReplied(1, errno.EBUSY), AttemptOver(1))
    assert story.record.reason is Reason.CHAR_DEVICE_BUSY
    assert story.record.detail == "EBUSY; no visible holder of /dev/ublkc0"


# --- detection without a pidfd -------------------------------------------------------------------


def test_two_reads_must_agree_where_no_pidfd_spoke(story: Story) -> None:
    story.watching()
    assert story.tell(story.read(DevState.QUIESCED)) == [ReadInfo()]
    assert story.record.phase is Phase.WATCHING
    story.tell(story.read(DevState.LIVE, OLD))
    assert story.tell(story.read(DevState.QUIESCED)) == [ReadInfo()]  # it began anew
    effects = story.tell(story.read(DevState.QUIESCED))
    assert effects == [Kill(OLD, 1), Spawn(1), ReadInfo()]
    assert story.record.detected_by == "poll"


def test_a_line_waits_until_the_old_server_is_seen_gone(story: Story) -> None:
    story.watching().tell(story.read(DevState.QUIESCED), story.read(DevState.QUIESCED))
    story.tell(Spawned(1, NEW), Ready(1), story.read(DevState.QUIESCED))
    assert story.tell(story.read(DevState.QUIESCED)) == []
    assert story.tell(ServerExited(OLD)) == [SendStart(1)]


def test_fail_io_is_an_outage_like_quiesced(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW), Ready(1))
    assert story.tell(story.read(DevState.FAIL_IO)) == [SendStart(1)]


# --- hands off -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [DevState.LIVE, DevState.QUIESCED])
@pytest.mark.parametrize(
    ("flags", "policy", "reason"),
    [
        (DevFlags(0), {}, Reason.NO_RECOVERY_FLAG),
        (DevFlags.USER_RECOVERY | DevFlags.UNPRIVILEGED_DEV, {}, Reason.NO_RECOVERY_FLAG),
        (DevFlags.USER_RECOVERY, {"has_spec": False}, Reason.NO_SPEC),
        (DevFlags.USER_RECOVERY, {"has_spec": False, "hands_off": Reason.FOREIGN}, Reason.FOREIGN),
        (DevFlags.USER_RECOVERY, {"generation": Generation.UNKNOWN}, Reason.NO_FEATURES),
    ],
)
def test_what_is_not_ours_is_only_observed(
    state: DevState, flags: DevFlags, policy: dict[str, object], reason: Reason
) -> None:
    record = Record(dev_id=0, instance="i")
    info = replace(INFO, state=state, flags=flags)
    for now in range(3):
        record, effects = step(
            record,
            InfoRead(info, "i", OLD),
            float(now),
            replace(Policy(), **policy),  # type: ignore[arg-type]
        )
        assert effects == ()
    assert (record.phase, record.reason) == (Phase.OBSERVED, reason)


def test_a_device_never_seen_live_is_not_recovered_by_an_old_spec(story: Story) -> None:
    story.policy = replace(story.policy, seen_live=False)
    story.tell(*[story.read(DevState.QUIESCED)] * 3)
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.NEVER_SEEN_LIVE)
    assert story.wishes == []


def test_a_device_that_lost_its_server_while_we_were_down_is_recovered(story: Story) -> None:
    effects = story.tell(story.read(DevState.QUIESCED))
    assert effects == [Spawn(1), ReadInfo()]
    assert story.record.detected_by == "startup"
    story.tell(Spawned(1, NEW), Ready(1), story.read(DevState.QUIESCED))
    assert story.record.phase is Phase.DRAINING  # one read alone is not enough
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(1)]


def test_a_live_device_whose_server_nobody_can_see_is_observed(story: Story) -> None:
    story.tell(story.read(DevState.LIVE, None))
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.NO_VISIBLE_SERVER)
    story.tell(story.read(DevState.LIVE, OLD))
    assert story.record.phase is Phase.WATCHING


@pytest.mark.parametrize("begin", ["watching", "draining", "starting", "attaching", "probation"])
def test_an_unknown_state_takes_the_hands_off(story: Story, begin: str) -> None:
    getattr(story, begin)()
    story.tell(story.read(9))
    if story.record.phase is Phase.STOPPING:
        story.tell(EndReplied(1, errno.EINTR), StartReplied(1, errno.EINTR), AttemptOver(1))
        story.tell(story.read(9))
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.UNKNOWN_STATE)
    assert story.tell(story.read(9)) == []


# --- gone, stopped, replaced, adopted ------------------------------------------------------------


@pytest.mark.parametrize("begin", ["watching", "draining", "starting", "attaching", "probation"])
@pytest.mark.parametrize("how", ["deleted", "stopped", "replaced"])
def test_nothing_is_resurrected(story: Story, begin: str, how: str) -> None:
    getattr(story, begin)()
    ways: dict[str, Event] = {
        "deleted": InfoMissing(),
        "stopped": story.read(DevState.DEAD),
        "replaced": story.read(DevState.LIVE, OTHER, f"{BOOT}/2"),
    }
    gone = ways[how]
    pending = story.record.pending
    effects = story.tell(gone)
    if begin in ("draining", "starting", "attaching"):
        assert effects == [*([Cancel(1)] if pending else []), EndAttempt(1)]
        story.tell(gone)
        assert story.tell(EndReplied(1, errno.EINTR), AttemptOver(1)) == []
    assert story.record.phase is Phase.GONE
    assert story.tell(story.read(DevState.QUIESCED), Woken(), InfoMissing()) == []


@pytest.mark.parametrize("begin", ["draining", "starting", "attaching"])
def test_somebody_elses_recovery_is_adopted(story: Story, begin: str) -> None:
    getattr(story, begin)()
    assert EndAttempt(1) in story.tell(story.read(DevState.LIVE, OTHER))
    story.tell(StartReplied(1, errno.EBUSY), EndReplied(1, errno.EBUSY))
    assert story.tell(AttemptOver(1)) == [ReadInfo()]
    assert story.tell(story.read(DevState.LIVE, OTHER)) == [Watch(OTHER)]
    assert (story.record.phase, story.record.server) == (Phase.WATCHING, OTHER)
    assert not [wish for wish in story.wishes if isinstance(wish, Spawn) and wish.seq > 1]


def test_a_server_changed_between_two_polls_is_adopted(story: Story) -> None:
    assert story.watching().tell(story.read(DevState.LIVE, OTHER)) == [Watch(OTHER)]


def test_end_that_was_done_already_is_a_recovery(story: Story) -> None:
    story.attaching()
    assert story.tell(EndReplied(1, errno.EBUSY)) == [ReadInfo()]
    story.tell(story.read(DevState.LIVE, NEW))
    assert (story.record.phase, story.record.server) == (Phase.PROBATION, NEW)


# --- the kernel's answers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "phase", "reason"),
    [
        (errno.EBUSY, Phase.BACKOFF, Reason.CHAR_DEVICE_BUSY),
        (errno.EINVAL, Phase.FAILED, Reason.START_REFUSED),
        (errno.EPERM, Phase.FAILED, Reason.START_REFUSED),
        (errno.EOPNOTSUPP, Phase.FAILED, Reason.START_REFUSED),
        (errno.ETIMEDOUT, Phase.FAILED, Reason.NO_ANSWER),
        (errno.ENODEV, Phase.GONE, None),
    ],
)
def test_a_refused_start_is_never_followed_by_end(
    story: Story, error: int, phase: Phase, reason: Reason | None
) -> None:
    story.starting().tell(StartReplied(1, error), AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (phase, reason)
    assert not [wish for wish in story.wishes if isinstance(wish, SendEnd | WriteLine)]


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENODEV, errno.ENOMEM])
def test_a_refused_end_ends_the_attempt(story: Story, error: int) -> None:
    assert story.attaching().tell(EndReplied(1, error)) == [EndAttempt(1)]
    story.tell(AttemptOver(1))
    expected = {Generation.G2: Reason.HALF_ATTACHED, Generation.G3: Reason.END_REFUSED}
    assert story.record.reason is expected[story.policy.generation]


@pytest.mark.parametrize("begin", ["draining", "starting", "attaching"])
def test_replies_of_another_attempt_change_nothing(story: Story, begin: str) -> None:
    getattr(story, begin)()
    before = story.record
    for seq in (0, 2):
        late: list[Event] = [
            Spawned(seq, OTHER),
            Ready(seq),
            SpawnFailed(seq, ""),
            StartReplied(seq, 0),
        ]
        assert story.tell(*late, EndReplied(seq, 0), AttemptOver(seq)) == []
    assert story.tell(ServerExited(OTHER)) == []
    assert story.record == before


def test_a_command_that_never_returns_is_a_named_failure(story: Story) -> None:
    story.starting()
    while story.is_in(Phase.STARTING):
        story.sleep()
    assert (
        story.now - story.record.marks[0][1]
        == story.policy.start_timeout_s + story.policy.stop_timeout_s
    )
    assert story.record.phase is Phase.STOPPING
    story.tell(AttemptOver(1))
    for _ in range(30):
        if story.record.wake is not None:
            story.sleep()
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.NO_ANSWER)


def test_time_in_which_we_slept_counts_for_no_deadline(story: Story) -> None:
    story.attaching()
    story.now += 3600
    story.record = delayed(story.record, 3600)
    assert story.tell(Woken()) == []
    assert story.record.phase is Phase.ATTACHING
    assert story.sleep() == [Cancel(1), EndAttempt(1)]  # and then it counts again


def test_why_a_device_is_only_reported_has_its_particulars(story: Story) -> None:
    why = "/opt/x: others can write it"
    story.policy = replace(story.policy, has_spec=False, hands_off=Reason.UNTRUSTED)
    story.policy = replace(story.policy, hands_off_why=why)
    story.tell(story.read(DevState.LIVE, OLD))
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.UNTRUSTED)
    assert story.record.detail == why
    refusal = orders.objection(story.record, Order.RECOVER, story.policy)
    assert refusal == Reason.UNTRUSTED.value


def test_how_a_server_was_lost_is_kept(story: Story) -> None:
    story.watching().tell(ServerExited(OLD, "SIGSEGV"))
    assert story.record.loss == Loss(OLD, "SIGSEGV")


def test_how_a_server_ended_that_had_let_go_before_is_kept_and_its_successors_end_is_not(
    story: Story,
) -> None:
    down = story.read(DevState.QUIESCED)
    story.watching().tell(down, down)
    assert (story.record.detected_by, story.record.loss) == ("poll", Loss(OLD))
    story.tell(ServerExited(OLD, "exit status 3"))
    assert story.record.loss == Loss(OLD, "exit status 3")
    story.tell(Spawned(story.record.seq, NEW), ServerExited(NEW, "SIGKILL"))
    assert story.record.loss == Loss(OLD, "exit status 3")


def test_a_recovery_ends_with_a_mark(story: Story) -> None:
    story.probation()
    story.now += 1
    story.tell(Woken(), story.read(DevState.LIVE, NEW))
    assert story.record.marks[-1] == ("watching", story.now)
    assert story.record.last_held_s == story.record.marks[-2][1] - story.record.marks[0][1]
