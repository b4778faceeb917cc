"""The machine, fact by fact: attempts that fail, and giving up. Rules 5, 8, 10."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from stories import BOOT, INFO, NEW, OLD, OTHER, Story

from ublkwatch import orders
from ublkwatch.events import (
    AttemptOver,
    Cancel,
    Decide,
    Decided,
    EndAttempt,
    EndReplied,
    Event,
    InfoMissing,
    InfoRead,
    Kill,
    ReadInfo,
    Ready,
    SendEnd,
    SendStart,
    SendStop,
    ServerAils,
    ServerExited,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    StopReplied,
    Woken,
    WriteLine,
)
from ublkwatch.model import (
    Ailment,
    Armed,
    Exhausted,
    Generation,
    Order,
    Phase,
    Reason,
    Record,
    ServerId,
)
from ublkwatch.uapi import DevState

# --- attempts that fail --------------------------------------------------------------------------


def test_a_server_that_dies_before_its_line_costs_an_attempt(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW))
    assert story.tell(ServerExited(NEW, "exit status 3")) == [EndAttempt(1)]
    story.tell(AttemptOver(1))
    assert (story.record.phase, story.record.detail) == (Phase.BACKOFF, "exit status 3")
    assert story.sleep() == [Spawn(2), ReadInfo()]


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        (SpawnFailed(1, "ENOENT"), Reason.SPAWN_FAILED),
        (Spawned(1, NEW), Reason.NOT_READY),
    ],
)
def test_a_server_that_does_not_come_up_costs_an_attempt(
    story: Story, fact: Event, reason: Reason
) -> None:
    story.draining().tell(fact)
    if story.is_in(Phase.DRAINING):
        story.tell(Woken(), after_s=story.policy.ready_timeout_s)
    story.tell(AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (Phase.BACKOFF, reason)
    assert len(story.record.failures) == 1


def test_attempts_are_limited_and_their_pauses_grow() -> None:
    story = Story(attempts_max=4).draining()
    pauses = []
    for seq in range(1, 5):
        story.tell(SpawnFailed(seq, "ENOENT"), AttemptOver(seq))
        if story.record.phase is Phase.BACKOFF:
            assert story.record.wake is not None
            pauses.append(story.record.wake - story.now)
            story.sleep()
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.SPAWN_FAILED)
    assert pauses == pytest.approx([0.2, 0.4, 0.8])
    assert story.record.wake is None


def test_a_failure_is_counted_once_whatever_symptom_came_first(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW), ServerExited(NEW), SpawnFailed(1, "x"), Woken())
    story.tell(ServerExited(NEW), AttemptOver(1))
    assert len(story.record.failures) == 1


def test_a_server_that_dies_while_start_is_under_way_is_not_attached(story: Story) -> None:
    story.starting().tell(ServerExited(NEW))
    assert story.tell(StartReplied(1, 0)) == [EndAttempt(1)]
    story.tell(AttemptOver(1))
    assert story.sleep() == [Spawn(2), ReadInfo()]
    story.tell(Spawned(2, OTHER), Ready(2))
    effects = story.tell(story.read(DevState.QUIESCED))
    if story.policy.generation is Generation.G2:  # START was taken, and is taken once
        assert effects == [WriteLine(2), SendEnd(2, OTHER.pid)]
    else:
        assert effects == [SendStart(2)]


@pytest.mark.parametrize("symptom", ["dies", "hangs"])
def test_half_attached_is_final_on_g2_and_an_attempt_on_g3(story: Story, symptom: str) -> None:
    story.attaching()
    if symptom == "dies":
        effects = story.tell(ServerExited(NEW, "SIGSEGV"))
    else:
        effects = story.tell(Woken(), after_s=story.policy.attach_timeout_s)
    assert effects == [Cancel(1), EndAttempt(1)]
    assert story.tell(AttemptOver(1)) == []
    assert story.is_in(Phase.STOPPING)  # END is still with the kernel
    story.tell(EndReplied(1, errno.EINTR))
    if story.policy.generation is Generation.G2:
        assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.HALF_ATTACHED)
        story.tell(story.read(DevState.QUIESCED), story.read(DevState.QUIESCED))
        assert story.record.phase is Phase.FAILED
    else:
        assert story.record.phase is Phase.BACKOFF
        story.sleep()
        story.tell(Spawned(2, OTHER), Ready(2))
        assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(2)]


def test_an_end_that_succeeded_after_all_completes_the_round(story: Story) -> None:
    story.attaching().tell(ServerExited(NEW), EndReplied(1, 0), AttemptOver(1))
    assert story.record.phase is Phase.BACKOFF  # not half attached: the kernel made it LIVE
    assert story.record.armed is Armed.NO
    story.sleep()
    story.tell(Spawned(2, OTHER), Ready(2))
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(2)]


def test_death_in_probation_costs_an_attempt_and_the_outage_goes_on(story: Story) -> None:
    story.probation().tell(ServerExited(NEW))
    story.tell(AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (Phase.BACKOFF, Reason.DIED_IN_PROBATION)
    story.sleep()
    story.tell(Spawned(2, OTHER), Ready(2))
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(2)]  # a new round, a new START


def test_live_with_a_dead_server_is_named_on_g2() -> None:
    story = Story(Generation.G2).probation()
    story.tell(ServerExited(NEW), AttemptOver(1))
    story.sleep()
    story.tell(Spawned(2, OTHER), Ready(2), story.read(DevState.LIVE))
    story.tell(Woken(), after_s=story.policy.drain_timeout_s)
    story.tell(AttemptOver(2))
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.LIVE_WITHOUT_SERVER)


def test_a_kernel_that_lets_go_after_all_is_a_new_outage() -> None:
    story = Story(Generation.G3).draining()
    story.tell(Spawned(1, NEW), Ready(1), story.read(DevState.LIVE))
    story.tell(Woken(), after_s=story.policy.drain_timeout_s)
    story.tell(AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.NOT_QUIESCED)
    assert story.tell(story.read(DevState.QUIESCED)) == [Spawn(2), ReadInfo()]


# --- the budget ----------------------------------------------------------------------------------


def test_a_permanent_exit_is_final_at_once(story: Story) -> None:
    story.failed()
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.PERMANENT_EXIT)


def test_a_permanent_exit_during_start_is_not_lost_to_its_answer(story: Story) -> None:
    story.starting().tell(ServerExited(NEW, "exit status 78", 78), StartReplied(1, errno.EBUSY))
    story.over()
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.PERMANENT_EXIT)


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_pauses_are_drawn_up_to_a_bound(story: Story, chance: float) -> None:
    story.policy = replace(story.policy, chance=chance)
    story.draining().tell(SpawnFailed(1, "x"), AttemptOver(1))
    assert story.record.wake == story.now + chance * story.policy.backoff_base_s


@pytest.mark.parametrize(("live_s", "left"), [(5.0, 1), (31.0, 0)])
def test_failures_outlast_a_recovery_that_was_not_stable(
    story: Story, live_s: float, left: int
) -> None:
    story.draining().tell(SpawnFailed(1, "x"), AttemptOver(1))
    story.sleep()
    story.tell(Spawned(2, NEW), Ready(2), story.read(DevState.QUIESCED))
    if story.is_in(Phase.STARTING):
        story.tell(StartReplied(2, 0))
    story.tell(EndReplied(2, 0))
    story.sleep()
    story.tell(story.read(DevState.LIVE, NEW))
    assert story.is_in(Phase.WATCHING)
    story.tell(ServerExited(NEW), after_s=live_s)
    assert len(story.record.failures) == left
    assert story.record.attempts == 1


def test_a_server_that_lets_go_in_probation_is_counted(story: Story) -> None:
    story.probation()
    assert story.tell(story.read(DevState.QUIESCED)) == [ReadInfo()]
    assert story.tell(story.read(DevState.QUIESCED)) == [EndAttempt(1)]
    assert len(story.record.failures) == 1
    assert story.record.reason is Reason.DIED_IN_PROBATION


def test_a_live_that_is_never_confirmed_is_left_alone(story: Story) -> None:
    story.probation()
    story.record = replace(story.record, server=None)
    story.outlast()
    assert story.is_in(Phase.OBSERVED)
    assert not [wish for wish in story.wishes if isinstance(wish, EndAttempt)]


def test_a_line_that_was_never_read_half_attached_nobody(story: Story) -> None:
    story.attaching().tell(ServerExited(NEW), EndReplied(1, errno.EINTR), AttemptOver(1, True))
    assert story.is_in(Phase.BACKOFF)


def test_an_unanswered_end_is_final(story: Story) -> None:
    story.attaching().tell(EndReplied(1, errno.ETIMEDOUT), AttemptOver(1))
    g2 = story.policy.generation is Generation.G2
    assert story.record.reason is (Reason.HALF_ATTACHED if g2 else Reason.NO_ANSWER)
    assert story.is_in(Phase.FAILED)


def test_an_interrupted_start_is_tried_again_and_g2s_einval_believed(story: Story) -> None:
    story.starting().tell(StartReplied(1, errno.EINTR), AttemptOver(1))
    assert (story.record.phase, story.record.armed) == (Phase.BACKOFF, Armed.UNSURE)
    story.sleep()
    story.tell(Spawned(2, OTHER), Ready(2))
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(2)]
    effects = story.tell(StartReplied(2, errno.EINVAL))
    g2 = story.policy.generation is Generation.G2
    assert effects == ([WriteLine(2), SendEnd(2, OTHER.pid)] if g2 else [EndAttempt(2)])


def test_a_queue_thread_lost_ends_the_server_and_begins_an_outage(story: Story) -> None:
    story.watching()
    assert story.tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "queue 1", 999.0)) == [Kill(OLD)]
    assert story.tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "queue 1", 999.0)) == []
    story.tell(ServerExited(OLD))
    assert (story.record.phase, story.record.detected_by) == (Phase.DRAINING, "dead_queue")


def test_a_queue_thread_lost_in_probation_does_not_outlive_its_server(story: Story) -> None:
    story.probation()
    assert story.tell(ServerAils(NEW, Ailment.DEAD_QUEUE, "queue 1", 999.0)) == [Kill(NEW)]
    story.tell(ServerExited(NEW), AttemptOver(1))
    assert story.record.detail == "queue 1"
    story.sleep()
    assert story.record.ill is None


# --- giving up -----------------------------------------------------------------------------------


def test_on_exhausted_hold_waits(story: Story) -> None:
    story.failed()
    assert (story.record.phase, story.record.wake) == (Phase.FAILED, None)


def test_on_exhausted_fail_stops_the_device_once_two_reads_agree(story: Story) -> None:
    story.policy = replace(story.policy, on_exhausted=Exhausted.FAIL)
    story.failed()
    assert story.is_in(Phase.FAILING)
    assert story.tell(story.read(DevState.QUIESCED)) == [ReadInfo()]
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStop(1)]
    story.tell(story.read(DevState.DEAD))  # that is our own doing
    story.tell(StopReplied(1, 0))
    assert (story.record.phase, story.record.stopped) == (Phase.FAILED, True)
    story.tell(story.read(DevState.DEAD))
    assert story.record.reason is Reason.PERMANENT_EXIT
    assert "stopped" in orders.objection(story.record, Order.RETRY, story.policy)
    story.tell(InfoMissing())
    assert story.is_in(Phase.GONE)


@pytest.mark.parametrize("pid", [NEW.pid, -1, 4711])
def test_stop_is_not_sent_where_the_server_may_live(story: Story, pid: int) -> None:
    story.policy = replace(story.policy, on_exhausted=Exhausted.FAIL)
    story.failed()
    live = InfoRead(replace(INFO, ublksrv_pid=pid), f"{BOOT}/1", None)
    assert story.tell(live) == ([] if pid == 4711 else [SendStop(1)])


def test_stop_waits_for_the_servers_end(story: Story) -> None:
    story.policy = replace(story.policy, hold_timeout_s=5, grace_s=60)
    story.watching().tell(story.read(DevState.QUIESCED), story.read(DevState.QUIESCED))
    assert story.tell(Woken(), after_s=6) == [Kill(OLD, 0), ReadInfo()]
    assert story.tell(*[story.read(DevState.QUIESCED)] * 3) == []
    assert story.tell(ServerExited(OLD)) == [ReadInfo()]
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStop(0)]


def test_stop_that_fails_or_is_never_sent_rests(story: Story) -> None:
    story.policy = replace(story.policy, on_exhausted=Exhausted.FAIL)
    story.failed()
    story.outlast()
    assert (story.record.phase, story.record.stopped) == (Phase.FAILED, False)
    assert "not sent" in story.record.detail


def deciding(story: Story) -> Story:
    story.policy = replace(story.policy, on_exhausted=Exhausted.EXEC)
    story.failed()
    assert story.wishes[-1] == Decide(1)
    return story


def test_the_operators_command_may_say_retry_so_often(story: Story) -> None:
    story.policy = replace(story.policy, decisions_max=1)
    deciding(story)
    assert Spawn(2) in story.tell(Decided(1, 10))
    story.tell(Spawned(2, NEW), ServerExited(NEW, "exit status 78", 78), AttemptOver(2))
    assert story.is_in(Phase.FAILED)


def test_the_operators_command_may_say_fail(story: Story) -> None:
    deciding(story).tell(Decided(1, 20))
    assert story.is_in(Phase.FAILING)


@pytest.mark.parametrize("code", [0, 1, None])
def test_whatever_else_it_says_is_hold(story: Story, code: int | None) -> None:
    deciding(story).tell(Decided(1, code, "killed"))
    assert story.is_in(Phase.FAILED)
    assert "on_exhausted command" in story.record.detail


def test_a_decision_that_never_comes_is_hold(story: Story) -> None:
    deciding(story).outlast()
    assert story.is_in(Phase.FAILED)


def test_no_decision_recovers_what_is_half_attached() -> None:
    story = Story(Generation.G2, on_exhausted=Exhausted.EXEC).attaching()
    story.tell(ServerExited(NEW), EndReplied(1, errno.EINTR), AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (Phase.DECIDING, Reason.HALF_ATTACHED)
    assert story.tell(Decided(1, 10)) == []
    assert story.is_in(Phase.FAILED)


def test_no_way_leads_behind_a_half_attached_server() -> None:
    story = Story(Generation.G2).attaching()
    story.tell(story.read(9))  # hands off: the attempt is ended
    story.tell(EndReplied(1, errno.EINTR), AttemptOver(1))
    assert story.is_in(Phase.OBSERVED)
    story.tell(story.read(DevState.QUIESCED))
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.HALF_ATTACHED)
    assert story.ask(Order.RETRY) == []


def test_a_kernel_that_comes_and_goes_does_not_give_the_budget_back() -> None:
    story = Story(attempts_max=2).draining()
    for seq in (1, 2):
        story.tell(Spawned(seq, NEW), Ready(seq), story.read(DevState.LIVE, None))
        story.tell(Woken(), after_s=story.policy.drain_timeout_s)
        story.over()
        story.tell(story.read(DevState.QUIESCED))
    assert (story.record.phase, story.record.attempts) == (Phase.FAILED, 2)


# --- hold_timeout_s ------------------------------------------------------------------------------


def overdue(story: Story) -> None:
    assert story.record.give_up_at is not None
    story.now = max(story.now, story.record.give_up_at)
    story.tell(Woken())


@pytest.mark.parametrize("begin", ["draining", "starting", "attaching", "failed"])
def test_io_waits_no_longer_than_it_may(story: Story, begin: str) -> None:
    story.policy = replace(story.policy, hold_timeout_s=5)
    getattr(story, begin)()
    overdue(story)
    if begin in ("starting", "attaching"):
        assert story.record.overdue  # what is past its START may still end it
        assert story.record.phase.value == begin
        story.outlast()
    if story.is_in(Phase.STOPPING):
        if story.record.pending:
            reply = StartReplied if begin == "starting" else EndReplied
            story.tell(reply(1, errno.EINTR))
        story.over()
    assert story.is_in(Phase.FAILING)


def test_io_that_waits_in_grace_or_backoff_waits_no_longer(story: Story) -> None:
    story.policy = replace(story.policy, hold_timeout_s=5, backoff_base_s=10)
    story.draining().tell(SpawnFailed(1, "x"), AttemptOver(1))
    overdue(story)
    assert (story.record.phase, story.record.reason) == (Phase.FAILING, Reason.SPAWN_FAILED)
    story.record = replace(Record(0, f"{BOOT}/1"))
    story.policy = replace(story.policy, grace_s=60)
    story.watching().tell(ServerExited(OLD))
    overdue(story)
    assert (story.record.phase, story.record.reason) == (Phase.FAILING, Reason.HOLD_TIMEOUT)


def test_who_holds_it_outranks_hold_timeout(story: Story) -> None:
    story.policy = replace(story.policy, hold_timeout_s=5)
    story.failed().ask(Order.HOLD)
    overdue(story)
    assert story.is_in(Phase.FAILED)
    assert story.record.next_wake() is None
    story.ask(Order.RELEASE)
    assert story.is_in(Phase.FAILING)


# --- grace ---------------------------------------------------------------------------------------


def test_grace_leaves_it_to_others_and_then_begins(story: Story) -> None:
    story.policy = replace(story.policy, grace_s=5)
    assert story.watching().tell(ServerExited(OLD)) == []
    assert story.is_in(Phase.GRACE)
    assert story.sleep() == [Spawn(1), ReadInfo()]


@pytest.mark.parametrize("server", [OLD, OTHER])
def test_what_others_bring_back_in_grace_is_adopted(story: Story, server: ServerId) -> None:
    """The same process may do so, as SPDK does."""
    story.policy = replace(story.policy, grace_s=5)
    story.watching().tell(story.read(DevState.QUIESCED), story.read(DevState.QUIESCED))
    assert story.is_in(Phase.GRACE)
    story.tell(story.read(DevState.LIVE, server))
    assert (story.record.phase, story.record.server) == (Phase.WATCHING, server)


# --- a bug ---------------------------------------------------------------------------------------


def test_a_quarantined_device_is_left_alone_and_wakes_nobody(story: Story) -> None:
    story.policy = replace(story.policy, hold_timeout_s=5)
    story.draining()
    story.record = replace(
        story.record, phase=Phase.FAILED, reason=Reason.INTERNAL_ERROR, wake=None
    )
    assert story.tell(story.read(DevState.QUIESCED), Woken(), after_s=10) == []
    assert story.record.next_wake() is None
    quarantined = story.record
    story.tell(story.read(DevState.DEAD))
    assert story.is_in(Phase.GONE)
    story.record = quarantined
    story.tell(story.read(DevState.LIVE, OTHER))
    assert story.is_in(Phase.WATCHING)
