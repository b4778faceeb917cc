"""The machine, fact by fact: servers that attach as they start, and delegates. Rules 3, 4, 5."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from stories import BOOT, NEW, OLD, OTHER, Story

from ublkwatch.events import (
    AttemptOver,
    Cancel,
    Effect,
    EndAttempt,
    EndReplied,
    FindHolders,
    FindServer,
    HoldersFound,
    InfoMissing,
    Kill,
    ReadInfo,
    Ready,
    Resumed,
    SendEnd,
    SendStart,
    ServerExited,
    ServerFound,
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
    Attach,
    Generation,
    Handoff,
    Loss,
    Order,
    Phase,
    Reason,
    ServerId,
)
from ublkwatch.uapi import DevState

FAR = ServerId(900, 9000, BOOT)  # what a server leaves behind when it becomes a daemon


@pytest.fixture
def starts(story: Story) -> Story:
    """A server that attaches as soon as it starts."""
    story.policy = replace(story.policy, attach=Attach.START)
    return story


@pytest.fixture
def delegated(story: Story) -> Story:
    story.policy = replace(story.policy, handoff=Handoff.DELEGATED)
    return story


def attached(story: Story) -> Story:
    """Tell it up to the END that sleeps for the new server."""
    assert story.watching().tell(ServerExited(OLD)) == [ReadInfo()]
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(1)]
    assert story.tell(StartReplied(1, 0)) == [Spawn(1)]
    assert story.tell(Spawned(1, NEW)) == [Watch(NEW), SendEnd(1, NEW.pid)]
    return story


def asked(story: Story) -> Story:
    """Tell it up to the recover command's start."""
    story.watching().tell(ServerExited(OLD))
    assert free(story) == Spawn(1)
    assert story.tell(Spawned(1, NEW)) == [Watch(NEW)]
    return story


def free(story: Story) -> Effect:
    """Let the kernel let go, and nobody hold the character device; return what follows."""
    seq = story.record.seq
    effects = story.tell(story.read(DevState.QUIESCED))
    if story.policy.generation is Generation.G3:
        assert effects == [SendStart(seq)]
        effects = story.tell(StartReplied(seq, 0))
    else:
        assert effects == [FindHolders(seq)]
        assert story.tell(HoldersFound(seq, "nobody", free=True, began=story.now)) == []
        story.now += story.policy.settle_s
        effects = story.tell(Woken())
    assert story.is_in(Phase.ATTACHING)
    assert len(effects) == 1
    return effects[0]


# --- attach = "start" ----------------------------------------------------------------------------


def test_a_server_that_attaches_as_it_starts_is_started_behind_start(starts: Story) -> None:
    attached(starts).tell(EndReplied(1, 0))
    assert (starts.record.phase, starts.record.server) == (Phase.PROBATION, NEW)


def test_its_start_up_is_within_the_deadline(starts: Story) -> None:
    attached(starts)
    policy = starts.policy
    assert starts.record.wake == starts.now + policy.attach_timeout_s + policy.ready_timeout_s
    starts.outlast()
    assert (starts.record.phase, starts.record.reason) == (Phase.STOPPING, Reason.ATTACH_TIMEOUT)


def test_a_spawn_that_failed_behind_start_is_not_half_attached(starts: Story) -> None:
    starts.watching().tell(ServerExited(OLD), starts.read(DevState.QUIESCED), StartReplied(1, 0))
    starts.tell(SpawnFailed(1, "ENOENT"), AttemptOver(1))
    assert starts.is_in(Phase.BACKOFF)
    starts.sleep()
    effects = starts.tell(starts.read(DevState.QUIESCED))
    g2 = starts.policy.generation is Generation.G2
    assert effects == ([Spawn(2)] if g2 else [SendStart(2)])  # G2 took it, and takes it once


def test_einval_of_end_means_another_process_of_the_attempt_on_g3() -> None:
    story = attached(Story(attach=Attach.START))
    assert story.tell(EndReplied(1, errno.EINVAL)) == [FindServer(1)]
    assert story.tell(ServerFound(1, FAR)) == [Watch(FAR), SendEnd(1, FAR.pid)]
    story.tell(EndReplied(1, 0))
    assert (story.record.phase, story.record.server) == (Phase.PROBATION, FAR)


def test_einval_of_end_is_a_refusal_on_g2() -> None:
    story = attached(Story(Generation.G2, attach=Attach.START))
    assert story.tell(EndReplied(1, errno.EINVAL)) == [EndAttempt(1)]


def test_nobody_found_behind_einval_fails_the_attempt() -> None:
    story = attached(Story(attach=Attach.START))
    story.tell(EndReplied(1, errno.EINVAL), ServerFound(1, None))
    assert (story.record.phase, story.record.reason) == (Phase.STOPPING, Reason.END_REFUSED)


def test_end_is_sent_a_bounded_number_of_times(story: Story) -> None:
    story.attaching()
    while story.is_in(Phase.ATTACHING):
        story.tell(EndReplied(1, errno.EINTR))
    assert len([wish for wish in story.wishes if isinstance(wish, SendEnd)]) == 8
    assert story.record.reason is Reason.END_REFUSED


def test_a_server_that_becomes_a_daemon_is_looked_for_until_the_deadline(starts: Story) -> None:
    attached(starts)
    assert starts.tell(ServerExited(NEW, "exit status 0", 0)) == [FindServer(1)]
    assert starts.tell(ServerFound(1, None)) == []  # it has not opened the device yet
    assert starts.sleep() == [FindServer(1)]
    assert starts.tell(ServerFound(1, FAR)) == [Watch(FAR), Cancel(1)]
    assert starts.tell(EndReplied(1, errno.EINTR)) == [SendEnd(1, FAR.pid)]
    starts.tell(EndReplied(1, 0))
    assert (starts.record.phase, starts.record.server) == (Phase.PROBATION, FAR)


def test_a_daemon_that_never_opens_the_device_ends_at_the_deadline(starts: Story) -> None:
    attached(starts).tell(ServerExited(NEW, "exit status 0", 0))
    begun = starts.record.since
    starts.outlast()
    assert starts.record.reason is Reason.ATTACH_TIMEOUT
    assert starts.now - begun <= 46


def test_end_that_is_done_before_the_daemon_is_found_is_ours(starts: Story) -> None:
    attached(starts).tell(ServerExited(NEW, "exit status 0", 0))
    assert starts.tell(EndReplied(1, 0)) == [FindServer(1)]
    assert starts.tell(starts.read(DevState.LIVE, FAR)) == [Watch(FAR), ReadInfo()]
    assert (starts.record.phase, starts.record.server) == (Phase.PROBATION, FAR)


def test_a_front_end_that_leaves_in_probation_leaves_its_daemon(starts: Story) -> None:
    attached(starts).tell(EndReplied(1, 0))
    assert starts.tell(ServerExited(NEW, "exit status 0", 0)) == [FindServer(1)]
    assert starts.tell(ServerFound(1, FAR)) == [Watch(FAR), ReadInfo()]
    starts.sleep()
    starts.tell(starts.read(DevState.LIVE, FAR))
    assert (starts.record.phase, starts.record.server) == (Phase.WATCHING, FAR)


@pytest.fixture
def lingering(starts: Story) -> Story:
    """A front end that is still there when the device is LIVE; G2 takes END for it."""
    attached(starts).tell(EndReplied(1, 0))
    starts.sleep()
    starts.tell(starts.read(DevState.LIVE, NEW))
    assert (starts.record.phase, starts.record.server) == (Phase.WATCHING, NEW)
    assert starts.tell(ServerExited(NEW, "exit status 0", 0)) == [FindServer(1)]
    return starts


def test_a_front_end_that_leaves_later_leaves_its_daemon(lingering: Story) -> None:
    assert lingering.tell(lingering.read(DevState.LIVE)) == []
    assert lingering.tell(ServerFound(1, FAR)) == [Watch(FAR), ReadInfo()]
    assert (lingering.record.phase, lingering.record.server) == (Phase.WATCHING, FAR)
    lingering.tell(ServerExited(FAR, "SIGKILL", -9))
    assert lingering.record.loss == Loss(FAR, "SIGKILL")


def test_who_leaves_nobody_later_is_lost(lingering: Story) -> None:
    assert lingering.tell(ServerFound(1, None)) == [ReadInfo()]
    assert lingering.is_in(Phase.DRAINING)
    assert (lingering.record.detected_by, lingering.record.loss) == (
        "pidfd",
        Loss(NEW, "exit status 0"),
    )


def test_what_the_kernel_says_is_not_waited_behind(lingering: Story) -> None:
    lingering.tell(lingering.read(DevState.QUIESCED), lingering.read(DevState.QUIESCED))
    assert (lingering.record.phase, lingering.record.detected_by) == (Phase.DRAINING, "poll")


def test_the_look_for_a_daemon_goes_on_after_our_restart(lingering: Story) -> None:
    assert lingering.tell(Resumed(None)) == [FindServer(1), ReadInfo()]


def test_a_front_end_that_leaves_nobody_died_in_probation(starts: Story) -> None:
    attached(starts).tell(EndReplied(1, 0), ServerExited(NEW, "exit", 0), ServerFound(1, None))
    assert starts.record.reason is Reason.DIED_IN_PROBATION


# --- delegated -----------------------------------------------------------------------------------


def test_a_delegate_speaks_every_command_itself(delegated: Story) -> None:
    asked(delegated)
    assert delegated.sleep() == [ReadInfo()]
    assert delegated.tell(delegated.read(DevState.LIVE, FAR)) == [Watch(FAR), ReadInfo()]
    delegated.sleep()
    delegated.tell(delegated.read(DevState.LIVE, FAR))
    assert (delegated.record.phase, delegated.record.server) == (Phase.WATCHING, FAR)
    assert not [w for w in delegated.wishes if isinstance(w, SendEnd | WriteLine)]
    starts = [wish for wish in delegated.wishes if isinstance(wish, SendStart)]
    assert len(starts) == (delegated.policy.generation is Generation.G3)


def test_a_delegate_that_exits_with_0_is_believed_when_the_device_is_live(
    delegated: Story,
) -> None:
    asked(delegated)
    assert delegated.tell(ServerExited(NEW, "exit status 0", 0)) == [ReadInfo()]
    delegated.tell(delegated.read(DevState.QUIESCED))
    assert delegated.is_in(Phase.ATTACHING)
    delegated.tell(delegated.read(DevState.LIVE, FAR))
    assert (delegated.record.phase, delegated.record.server) == (Phase.PROBATION, FAR)


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_delegate_that_fails_is_final_on_g2_and_retried_by_order(
    delegated: Story, how: str
) -> None:
    asked(delegated)
    if how == "fails":
        delegated.tell(ServerExited(NEW, "exit status 237", 237))
    else:
        delegated.outlast()
    reason = {"fails": Reason.DELEGATE_FAILED, "hangs": Reason.ATTACH_TIMEOUT}[how]
    assert (delegated.record.phase, delegated.record.reason) == (Phase.STOPPING, reason)
    delegated.over()
    if delegated.policy.generation is Generation.G2:
        assert (delegated.record.phase, delegated.record.reason) == (Phase.FAILED, reason)
        assert delegated.ask(Order.RETRY) == [ReadInfo()]
    else:
        assert delegated.is_in(Phase.BACKOFF)
        assert delegated.sleep() == [ReadInfo()]
    assert free(delegated) == Spawn(2)


def test_a_delegate_is_waited_for_after_our_restart(delegated: Story) -> None:
    asked(delegated)
    assert delegated.tell(Resumed(NEW)) == [Watch(NEW), ReadInfo()]
    delegated.tell(ServerExited(NEW))  # not our child any more: nobody knows its exit code
    assert delegated.is_in(Phase.ATTACHING)
    delegated.tell(delegated.read(DevState.LIVE, FAR))
    assert delegated.is_in(Phase.PROBATION)


def test_a_delegate_waits_on_g2_until_nobody_holds_the_character_device() -> None:
    """There START would be the end of the command's own."""
    story = Story(Generation.G2, handoff=Handoff.DELEGATED).watching()
    story.tell(ServerExited(OLD))
    assert story.tell(story.read(DevState.QUIESCED)) == [FindHolders(1)]
    story.tell(HoldersFound(1, "held by 7", began=story.now))
    pauses = []
    for _ in range(8):
        before = story.now
        assert story.sleep() == [FindHolders(1), ReadInfo()]
        pauses.append(story.now - before)
        story.tell(HoldersFound(1, "held by 7", began=story.now))
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == pytest.approx((0.2, 1.51875))
    story.tell(HoldersFound(1, "nobody", free=True, began=story.now))
    assert not [wish for wish in story.wishes if isinstance(wish, Spawn | SendStart)]
    free_at = story.now
    assert story.sleep() == [Spawn(1)]
    assert story.now == pytest.approx(free_at + story.policy.settle_s)


def test_a_holder_that_comes_while_the_device_settles_is_waited_for_too() -> None:
    story = Story(Generation.G2, handoff=Handoff.DELEGATED).watching()
    story.tell(ServerExited(OLD), story.read(DevState.QUIESCED))
    story.tell(HoldersFound(1, "nobody", free=True, began=story.now))
    story.tell(HoldersFound(1, "held by 7", began=story.now))
    assert story.sleep() == [FindHolders(1), ReadInfo()]
    assert story.is_in(Phase.DRAINING)


def test_a_look_from_before_the_kernel_let_go_says_nothing() -> None:
    story = Story(Generation.G2, handoff=Handoff.DELEGATED).watching()
    story.tell(ServerExited(OLD))
    began = story.now
    story.tell(story.read(DevState.LIVE), after_s=1)
    story.tell(story.read(DevState.QUIESCED), after_s=1)
    story.tell(HoldersFound(1, "nobody", free=True, began=began))
    assert story.record.free_since is None
    # Neither does one from before somebody had it LIVE for a moment.
    began = story.now
    story.tell(story.read(DevState.LIVE), after_s=1)
    story.tell(HoldersFound(1, "nobody", free=True, began=began))
    assert story.tell(story.read(DevState.QUIESCED), after_s=1) == [FindHolders(1)]
    assert story.record.free_since is None


def test_a_holder_that_stays_costs_a_delegate_an_attempt_on_g2() -> None:
    """Nothing was sent: it is not half attached, and another attempt may follow."""
    story = Story(Generation.G2, handoff=Handoff.DELEGATED).watching()
    story.tell(ServerExited(OLD), story.read(DevState.QUIESCED))
    begun = story.now
    while story.is_in(Phase.DRAINING):
        story.tell(HoldersFound(1, "held by 7", began=story.now))
        story.sleep()
    assert story.now - begun == pytest.approx(story.policy.start_timeout_s)
    assert story.record.reason is Reason.CHAR_DEVICE_BUSY
    story.over()
    assert (story.record.phase, story.record.detail) == (Phase.BACKOFF, "held by 7")
    assert not [wish for wish in story.wishes if isinstance(wish, Spawn)]


def test_a_holder_is_named_by_start_on_g3() -> None:
    story = Story(handoff=Handoff.DELEGATED).watching()
    story.tell(ServerExited(OLD), story.read(DevState.QUIESCED))
    story.tell(StartReplied(1, errno.EBUSY), AttemptOver(1))
    assert (story.record.phase, story.record.reason) == (Phase.BACKOFF, Reason.CHAR_DEVICE_BUSY)
    assert not [wish for wish in story.wishes if isinstance(wish, Spawn)]


def test_hold_breaks_a_look_for_holders_off() -> None:
    story = Story(Generation.G2, handoff=Handoff.DELEGATED).watching()
    story.tell(ServerExited(OLD), story.read(DevState.QUIESCED))
    story.ask(Order.HOLD)
    story.over()
    assert story.is_in(Phase.HELD)


def test_a_delegate_may_say_by_its_exit_that_it_sent_nothing(delegated: Story) -> None:
    delegated.policy = replace(delegated.policy, retry_exits=frozenset({3}))
    asked(delegated).tell(ServerExited(NEW, "exit status 3", 3), AttemptOver(1))
    assert (delegated.record.phase, delegated.record.reason) == (
        Phase.BACKOFF,
        Reason.DELEGATE_FAILED,
    )
    delegated.sleep()
    assert free(delegated) == Spawn(2)


@pytest.mark.parametrize("when", ["while it runs", "when it has failed", "when all is over"])
def test_a_device_that_a_delegate_deleted_is_named(when: str) -> None:
    story = asked(Story(handoff=Handoff.DELEGATED))
    if when != "while it runs":
        effects = story.tell(ServerExited(NEW, "exit status 1", 1))
        assert effects == [EndAttempt(1), ReadInfo()]
    if when == "when all is over":
        story.over()
    story.tell(InfoMissing())
    if story.is_in(Phase.STOPPING):
        story.over()
    assert (story.record.phase, story.record.reason) == (Phase.GONE, Reason.DELEGATE_DELETED)


def test_a_device_that_is_dead_behind_a_delegate_is_named_as_well(delegated: Story) -> None:
    asked(delegated).tell(delegated.read(DevState.DEAD), AttemptOver(1))
    assert delegated.record.reason is Reason.DELEGATE_DELETED


def test_a_device_that_goes_before_a_delegate_ran_was_not_deleted_by_it(delegated: Story) -> None:
    delegated.watching().tell(ServerExited(OLD), delegated.read(DevState.QUIESCED), InfoMissing())
    delegated.tell(StartReplied(1, errno.ENODEV), AttemptOver(1))
    assert (delegated.record.phase, delegated.record.reason) == (Phase.GONE, None)


@pytest.mark.parametrize("server", [FAR, None])
def test_live_before_a_delegate_is_seen_to_start_is_asked_about(
    delegated: Story, server: ServerId | None
) -> None:
    """Ours was quicker than the news of it; or somebody else's, behind which nothing is run."""
    delegated.watching().tell(ServerExited(OLD))
    assert free(delegated) == Spawn(1)
    assert delegated.tell(delegated.read(DevState.LIVE, FAR)) == [FindServer(1)]
    effects = delegated.tell(ServerFound(1, server))
    if server:
        assert effects == [Watch(FAR), ReadInfo()]
        assert (delegated.record.phase, delegated.record.server) == (Phase.PROBATION, FAR)
    else:
        assert effects == [EndAttempt(1)]
        delegated.over()
        delegated.tell(delegated.read(DevState.LIVE, FAR))
        assert (delegated.record.phase, delegated.record.server) == (Phase.WATCHING, FAR)


def test_a_delegate_that_ended_before_it_was_seen_may_have_done_anything(delegated: Story) -> None:
    delegated.watching().tell(ServerExited(OLD))
    free(delegated)
    delegated.tell(SpawnFailed(1, "exit status 1: no", ran=True, code=1), AttemptOver(1))
    g2 = delegated.policy.generation is Generation.G2
    assert delegated.record.phase is (Phase.FAILED if g2 else Phase.BACKOFF)
    assert delegated.record.reason is Reason.DELEGATE_FAILED


def test_a_front_end_that_left_before_it_was_seen_leaves_its_daemon(starts: Story) -> None:
    starts.watching().tell(ServerExited(OLD), starts.read(DevState.QUIESCED), StartReplied(1, 0))
    gone = SpawnFailed(1, "exit status 0", ran=True, code=0)
    assert starts.tell(gone) == [FindServer(1)]
    assert starts.tell(ServerFound(1, None)) == []
    assert starts.sleep() == [FindServer(1)]
    assert starts.tell(ServerFound(1, FAR)) == [Watch(FAR), SendEnd(1, FAR.pid)]


def test_a_read_that_names_the_ended_server_is_late(delegated: Story) -> None:
    asked(delegated)
    assert delegated.tell(delegated.read(DevState.LIVE, OLD)) == []
    assert delegated.is_in(Phase.ATTACHING)


# --- rule 3: never two ---------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [0, 1])
def test_a_server_that_came_up_too_late_is_ended(story: Story, seq: int) -> None:
    story.draining().tell(SpawnFailed(1, "x"), AttemptOver(1))
    assert story.tell(Spawned(seq, OTHER)) == [Kill(OTHER, seq)]


def test_ready_before_spawned_loses_nothing(story: Story) -> None:
    story.draining().tell(Ready(1), story.read(DevState.QUIESCED))
    assert story.tell(Spawned(1, NEW)) == [Watch(NEW), SendStart(1)]


@pytest.mark.parametrize("state", [DevState.QUIESCED, DevState.LIVE])
def test_end_that_is_busy_is_decided_by_two_reads(story: Story, state: DevState) -> None:
    story.attaching()
    assert story.tell(EndReplied(1, errno.EBUSY)) == [ReadInfo()]
    assert story.tell(story.read(DevState.QUIESCED)) == [ReadInfo()]  # as it was a moment ago
    story.tell(story.read(state, NEW if state is DevState.LIVE else None))
    live = state is DevState.LIVE
    assert story.is_in(Phase.PROBATION if live else Phase.STOPPING)
    assert live or story.record.reason is Reason.END_REFUSED


def test_live_by_nobody_we_saw_ends_the_round_of_an_accepted_start() -> None:
    """Then END without another START would make a false LIVE on G2."""
    story = Story(Generation.G2).starting()
    story.tell(ServerExited(NEW), StartReplied(1, 0), AttemptOver(1))
    assert story.record.armed is Armed.YES
    story.tell(story.read(DevState.LIVE))  # somebody else's, whom we cannot see
    story.sleep()
    story.tell(Spawned(2, OTHER), Ready(2))
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(2)]


def test_a_delegate_has_the_cpu_while_it_comes_up() -> None:
    """Its device is LIVE by its own END: to see that a little later costs no I/O."""
    story = Story(handoff=Handoff.DELEGATED).watching()
    story.tell(ServerExited(OLD), story.read(DevState.QUIESCED), StartReplied(1, 0))
    story.tell(Spawned(1, NEW))
    began, looks = story.now, 0
    while story.now < began + 1.4:
        looks += story.sleep() == [ReadInfo()]
        story.tell(story.read(DevState.QUIESCED))
    assert 10 < looks < 40
