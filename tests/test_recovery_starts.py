"""The machine, fact by fact: starts that wait, pre_recover, shared servers. Rules 8, 10, 13."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from stories import NEW, OLD, OTHER, Story

from ublkwatch import orders
from ublkwatch.events import (
    AttemptOver,
    AttemptShared,
    EndAttempt,
    EndReplied,
    Event,
    Kill,
    ReadInfo,
    Ready,
    Resumed,
    SendStart,
    ServerAils,
    ServerExited,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    Watch,
    Woken,
)
from ublkwatch.model import (
    Ailment,
    Attach,
    Exhausted,
    Generation,
    Order,
    Phase,
    Reason,
    SpawnVerdict,
)
from ublkwatch.recovery import delayed
from ublkwatch.uapi import DevState

# --- a start that waits for others ---------------------------------------------------------------


def test_the_deadline_of_ready_counts_from_the_servers_start(story: Story) -> None:
    story.draining().tell(story.read(DevState.QUIESCED))
    story.tell(Woken(), after_s=story.policy.ready_timeout_s + 60)
    assert story.is_in(Phase.DRAINING)
    story.tell(Spawned(1, NEW), after_s=100)
    assert story.record.wake == story.now + story.policy.ready_timeout_s
    story.sleep()
    assert story.record.reason is Reason.NOT_READY


def test_a_server_that_is_never_started_costs_an_attempt(story: Story) -> None:
    story.draining().tell(story.read(DevState.QUIESCED))
    story.outlast()
    assert story.now == story.record.marks[0][1] + story.policy.queue_timeout_s
    assert story.record.reason is Reason.SPAWN_FAILED
    assert "not started in time" in story.record.detail
    story.over()
    assert story.is_in(Phase.BACKOFF)


def test_the_deadline_of_a_late_start_counts_from_it(story: Story) -> None:
    story.policy = replace(story.policy, attach=Attach.START)
    story.watching().tell(ServerExited(OLD), story.read(DevState.QUIESCED), StartReplied(1, 0))
    assert story.record.wake == story.now + story.policy.queue_timeout_s
    story.tell(Spawned(1, NEW), after_s=500)
    begun, policy = story.now, story.policy
    story.outlast()
    assert story.now - begun == pytest.approx(policy.ready_timeout_s + policy.attach_timeout_s)
    assert story.record.reason is Reason.ATTACH_TIMEOUT


def test_a_server_that_was_never_started_is_not_half_attached() -> None:
    story = Story(Generation.G2, attach=Attach.START).watching()
    story.tell(ServerExited(OLD), story.read(DevState.QUIESCED), StartReplied(1, 0))
    assert story.record.lined
    story.outlast().over()
    assert (story.record.phase, story.record.reason) == (Phase.BACKOFF, Reason.SPAWN_FAILED)


@pytest.mark.parametrize("late", [Spawned(1, NEW), SpawnFailed(1, "exit", ran=True, code=1)])
def test_a_server_that_was_started_while_its_attempt_ended_may_be_half_attached(
    late: Spawned | SpawnFailed,
) -> None:
    story = Story(Generation.G2, attach=Attach.START).watching()
    story.tell(ServerExited(OLD), story.read(DevState.QUIESCED), StartReplied(1, 0))
    story.outlast().tell(late, AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.HALF_ATTACHED)


def test_after_our_restart_a_servers_time_counts_anew(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW))
    story.tell(Resumed(NEW), after_s=1000)
    assert story.record.spawned_at == story.now


def test_time_in_which_we_slept_counts_for_no_server(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW))
    later = delayed(story.record, 100)
    assert later.spawned_at == story.now + 100
    assert later.quiet_since is None


# --- a standby, which is a server that was started earlier ---------------------------------------


@pytest.mark.parametrize("code", [None, 78])
def test_that_a_standby_ended_before_its_line_is_no_failed_attempt(
    story: Story, code: int | None
) -> None:
    story.policy = replace(story.policy, attempts_max=1)
    seq = story.draining().record.seq
    story.tell(Spawned(seq, NEW, standby=True), Ready(seq), ServerExited(NEW, "SIGKILL", code))
    story.over()
    assert (story.record.phase, story.record.reason) == (Phase.BACKOFF, Reason.STANDBY_LOST)
    assert (story.record.failures, story.record.detail) == ((), "SIGKILL")
    assert story.record.wake == story.now
    assert story.sleep() == [Spawn(seq + 1), ReadInfo()]
    story.tell(Spawned(seq + 1, OTHER), ServerExited(OTHER, "exit status 1", 1))
    assert (story.record.reason, len(story.record.failures)) == (Reason.DIED_BEFORE_READY, 1)


def test_a_standby_that_ends_while_start_is_with_the_kernel_costs_nothing_either(
    story: Story,
) -> None:
    seq = story.draining().record.seq
    story.tell(Spawned(seq, NEW, standby=True), Ready(seq), story.read(DevState.QUIESCED))
    assert story.is_in(Phase.STARTING)
    story.tell(ServerExited(NEW, "SIGKILL"), StartReplied(seq, 0))
    story.over()
    assert (story.record.phase, story.record.reason) == (Phase.BACKOFF, Reason.STANDBY_LOST)
    assert story.record.failures == ()


def test_a_standby_that_has_its_line_is_a_server_as_any_other(story: Story) -> None:
    seq = story.draining().record.seq
    story.tell(Spawned(seq, NEW, standby=True), Ready(seq), story.read(DevState.QUIESCED))
    story.tell(StartReplied(seq, 0), ServerExited(NEW, "SIGKILL"))
    assert (story.record.reason, len(story.record.failures)) == (Reason.DIED_ATTACHING, 1)


# --- what pre_recover says -----------------------------------------------------------------------


def test_what_pre_recover_puts_off_is_not_counted(story: Story) -> None:
    story.policy = replace(story.policy, attempts_max=1, chance=0.0)
    story.draining()
    for seq in range(1, 6):
        story.tell(SpawnFailed(seq, "fenced", SpawnVerdict.LATER), AttemptOver(seq))
        assert (story.record.phase, story.record.reason) == (Phase.BACKOFF, Reason.HOOK_LATER)
        assert (story.record.failures, story.record.detail) == ((), "fenced")
        assert story.record.wake == story.now + story.policy.hook_pause_s
        assert story.sleep() == [Spawn(seq + 1), ReadInfo()]


def test_io_waits_for_pre_recover_no_longer_than_it_may(story: Story) -> None:
    story.policy = replace(story.policy, hold_timeout_s=12)
    story.draining()
    while not story.is_in(Phase.FAILING):
        seq = story.record.seq
        story.tell(SpawnFailed(seq, "fenced", SpawnVerdict.LATER), AttemptOver(seq))
        story.now = story.record.next_wake() or story.now
        story.tell(Woken())
    assert story.now == story.record.marks[0][1] + 12


@pytest.mark.parametrize(
    ("verdict", "reason", "phase"),
    [
        (SpawnVerdict.HOOK_FAILED, Reason.HOOK_FAILED, Phase.BACKOFF),
        (SpawnVerdict.PARK, Reason.HOOK_PARKED, Phase.FAILED),
    ],
)
def test_what_pre_recover_refuses_is_counted(
    story: Story, verdict: SpawnVerdict, reason: Reason, phase: Phase
) -> None:
    story.draining().tell(SpawnFailed(1, "no", verdict), AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (phase, reason)
    assert (len(story.record.failures), story.record.detail) == (1, "no")


def test_pre_recover_may_put_off_a_server_behind_its_start(story: Story) -> None:
    """On G2 that START is the one that it takes, and nobody has attached."""
    story.policy = replace(story.policy, attach=Attach.START)
    story.watching().tell(ServerExited(OLD), story.read(DevState.QUIESCED), StartReplied(1, 0))
    story.tell(SpawnFailed(1, "fenced", SpawnVerdict.LATER), AttemptOver(1))
    assert story.is_in(Phase.BACKOFF)
    story.sleep()
    g2 = story.policy.generation is Generation.G2
    expected = [Spawn(2)] if g2 else [SendStart(2)]
    assert story.tell(story.read(DevState.QUIESCED)) == expected


# --- a server of several devices -----------------------------------------------------------------

SPARED = AttemptShared(1, NEW, "ublkb1")


def spared(story: Story) -> Story:
    """Give the device up because its new server serves others, for whom it is fine."""
    story.draining().tell(Spawned(1, NEW), Woken(), after_s=story.policy.ready_timeout_s)
    assert story.is_in(Phase.STOPPING)
    assert story.tell(SPARED) == [Watch(NEW)]
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.SHARED_SERVER)
    return story


def test_a_server_of_other_devices_is_not_ended_for_one_devices_sake(story: Story) -> None:
    spared(story)
    assert story.record.wake is None
    assert "the server was not ready in time" in story.record.detail
    assert "process 200 serves ublkb1" in story.record.detail
    told: list[Event] = [
        story.read(DevState.QUIESCED),
        Woken(),
        ServerExited(OTHER),
        AttemptOver(2),
        SPARED,
    ]
    assert story.tell(*told, after_s=100) == []
    assert story.is_in(Phase.FAILED)
    assert not [wish for wish in story.wishes if isinstance(wish, Kill)]


@pytest.mark.parametrize("order", [Order.RETRY, Order.RECOVER])
def test_to_begin_again_beside_it_is_refused_with_the_way_out(story: Story, order: Order) -> None:
    spared(story)
    refusal = orders.objection(story.record, order, story.policy)
    assert "process 200 serves ublkb1" in refusal
    assert "once that process has ended it is recovered" in refusal
    assert story.ask(order) == []


def test_when_that_server_ends_one_more_attempt_is_allowed(story: Story) -> None:
    story.policy = replace(story.policy, attempts_max=1)
    spared(story)
    assert story.tell(ServerExited(NEW)) == [EndAttempt(1)]
    story.over()
    assert story.sleep() == [Spawn(2), ReadInfo()]
    assert story.record.wake is not None
    story.tell(SpawnFailed(2, "ENOENT"), AttemptOver(2))
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.SPAWN_FAILED)


def test_that_server_is_adopted_if_it_serves_after_all(story: Story) -> None:
    spared(story).tell(story.read(DevState.LIVE, NEW))
    assert (story.record.phase, story.record.server) == (Phase.WATCHING, NEW)
    assert story.tell(ServerExited(NEW)) == [Spawn(2), ReadInfo()]  # nothing is left of attempt 1


def test_half_attached_stays_so_when_that_server_ends() -> None:
    story = Story(Generation.G2).attaching()
    story.tell(Woken(), after_s=story.policy.attach_timeout_s)
    assert story.tell(SPARED) == []  # END is with the kernel
    assert story.tell(EndReplied(1, errno.EINTR), SPARED) == [Watch(NEW)]
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.HALF_ATTACHED)
    before = len(story.wishes)
    story.tell(ServerExited(NEW), AttemptOver(1), story.read(DevState.QUIESCED))
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.HALF_ATTACHED)
    assert story.wishes[before:] == [EndAttempt(1)]


def test_a_server_that_let_go_of_one_device_alone_is_not_killed(story: Story) -> None:
    story.watching().tell(story.read(DevState.QUIESCED))
    assert story.tell(story.read(DevState.QUIESCED)) == [Kill(OLD, 1), Spawn(1), ReadInfo()]
    assert story.tell(AttemptShared(1, OLD, "ublkb1")) == [EndAttempt(1)]
    story.over()
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.SHARED_SERVER)
    assert story.record.failures == ()
    assert story.tell(ServerExited(OLD)) == [Spawn(2), ReadInfo()]


def test_a_server_that_lost_a_thread_is_killed_whomever_it_serves(story: Story) -> None:
    assert story.watching().tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "queue 0", 999.0)) == [
        Kill(OLD)
    ]


def test_a_device_of_a_shared_server_that_is_held_stays_held(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW), Ready(1))
    story.ask(Order.HOLD)
    assert story.tell(SPARED) == [Watch(NEW)]
    assert story.is_in(Phase.HELD)
    assert story.ask(Order.RELEASE) == [EndAttempt(1)]
    story.tell(SPARED)
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.SHARED_SERVER)
    story.ask(Order.HOLD)
    story.tell(ServerExited(NEW))
    assert story.is_in(Phase.HELD)
    assert story.ask(Order.RELEASE) == [EndAttempt(1)]


def test_stop_dev_waits_for_a_shared_server_as_well(story: Story) -> None:
    """STOP_DEV behind a living server could hang; and it is for a device alone."""
    story.policy = replace(story.policy, on_exhausted=Exhausted.FAIL, hold_timeout_s=100)
    spared(story).tell(Woken(), after_s=200)
    assert story.record.overdue
    assert story.is_in(Phase.FAILED)
    story.tell(ServerExited(NEW), AttemptOver(1))
    assert (story.record.phase, story.record.stopped) == (Phase.FAILING, False)


def test_an_attempt_of_a_shared_server_that_is_left_is_left(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW))
    story.ask(Order.FORGET)
    story.tell(SPARED)
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.FORGOTTEN)


def test_a_restart_goes_on_waiting_for_it(story: Story) -> None:
    assert spared(story).tell(Resumed(None)) == [Watch(NEW), ReadInfo()]
    assert story.tell(ServerExited(NEW)) == [EndAttempt(1)]


def test_the_answer_about_a_server_that_has_ended_is_late(story: Story) -> None:
    story.draining().tell(Spawned(1, NEW), ServerExited(NEW))
    assert story.tell(SPARED) == []
    assert story.is_in(Phase.STOPPING)


# --- a rule that is gone -------------------------------------------------------------------------


@pytest.mark.parametrize("fact", ["read", "exit", "down"])
def test_a_device_whose_rule_is_gone_is_only_observed(story: Story, fact: str) -> None:
    story.watching()
    story.policy = replace(story.policy, has_spec=False, hands_off_why="why not")
    if fact == "read":
        wishes = story.tell(story.read(DevState.LIVE, OLD))
    elif fact == "exit":
        wishes = story.tell(ServerExited(OLD))
    else:
        wishes = story.tell(story.read(DevState.QUIESCED), story.read(DevState.QUIESCED))
    assert wishes == []
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.NO_SPEC)
