"""The machine, fact by fact: operators, and the end of the host. Rule 12."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from stories import NEW, OLD, OTHER, Story

from ublkwatch.events import (
    AttemptOver,
    Cancel,
    Effect,
    EndAttempt,
    EndReplied,
    Kill,
    ReadInfo,
    Ready,
    SendEnd,
    ServerAils,
    ServerExited,
    ShutdownBegun,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    Woken,
    WriteLine,
)
from ublkwatch.model import (
    Ailment,
    Exhausted,
    Generation,
    Order,
    Phase,
    Reason,
)
from ublkwatch.orders import objection
from ublkwatch.uapi import DevState

ATTEMPTS = ["draining", "starting", "attaching"]
PHASES = ["watching", *ATTEMPTS, "probation", "failed"]


def end(story: Story) -> None:
    """Let the attempt's commands and processes end."""
    seq = story.record.seq
    story.tell(StartReplied(seq, errno.EINTR), EndReplied(seq, errno.EINTR), AttemptOver(seq))


@pytest.mark.parametrize("begin", PHASES)
def test_hold_begins_nothing_and_breaks_nothing_off_behind_start(story: Story, begin: str) -> None:
    getattr(story, begin)()
    phase, effects = story.record.phase, story.ask(Order.HOLD)
    assert story.record.held
    if begin == "draining":
        assert effects == [EndAttempt(1)]
        story.over()
        assert (story.record.phase, story.record.reason) == (Phase.HELD, Reason.HELD)
    else:
        assert (story.record.phase, effects) == (phase, [])


@pytest.mark.parametrize("begin", ["starting", "attaching", "probation"])
def test_a_held_attempt_that_fails_is_the_last(story: Story, begin: str) -> None:
    getattr(story, begin)().ask(Order.HOLD)
    story.tell(ServerExited(NEW))
    end(story)
    assert story.is_in(Phase.HELD)
    assert story.record.next_wake() is None


def test_a_crash_while_held_waits_for_release(story: Story) -> None:
    story.watching().ask(Order.HOLD)
    assert story.tell(ServerExited(OLD)) == []
    assert story.is_in(Phase.HELD)
    assert story.ask(Order.RELEASE) == [Spawn(1), ReadInfo()]


def test_a_hold_ends_with_its_time(story: Story) -> None:
    story.watching().ask(Order.HOLD, until=story.now + 60)
    story.tell(ServerExited(OLD))
    assert story.tell(Woken(), after_s=61) == [Spawn(1), ReadInfo()]
    assert not story.record.held


def test_a_hold_ends_with_its_time_where_nothing_waits(story: Story) -> None:
    story.watching().ask(Order.HOLD, until=story.now + 60)
    assert story.tell(Woken(), after_s=61) == []
    assert (story.record.held, story.record.next_wake()) == (False, None)


def test_a_release_while_the_attempt_ends_is_not_lost(story: Story) -> None:
    story.draining().ask(Order.HOLD)
    story.ask(Order.RELEASE)
    story.over()
    assert story.is_in(Phase.BACKOFF)
    assert story.sleep() == [Spawn(2), ReadInfo()]


def test_a_hold_while_the_overdue_attempt_ends_is_obeyed(story: Story) -> None:
    story.policy = replace(story.policy, hold_timeout_s=5)
    story.draining().tell(Woken(), after_s=6)
    story.ask(Order.HOLD)
    story.over()
    assert story.is_in(Phase.HELD)


def test_a_thread_lost_while_held_is_seen_to_at_release(story: Story) -> None:
    story.watching().ask(Order.HOLD)
    assert story.tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "queue 0", 999.0)) == []
    assert story.ask(Order.RELEASE) == [Kill(OLD)]


def test_retry_gives_a_new_budget(story: Story) -> None:
    story.failed()
    assert story.ask(Order.RETRY) == [Spawn(2), ReadInfo()]
    assert story.record.failures == ()


@pytest.mark.parametrize("begin", ["watching", *ATTEMPTS, "probation"])
@pytest.mark.parametrize("order", [Order.RETRY, Order.RECOVER, Order.RELEASE])
def test_what_cannot_be_done_is_refused_in_words(story: Story, begin: str, order: Order) -> None:
    getattr(story, begin)()
    before = story.record
    assert objection(story.record, order, story.policy)
    assert story.ask(order) == []
    assert story.record == before


def test_retry_ends_what_is_left_of_the_last_attempt_first(story: Story) -> None:
    story.draining().tell(SpawnFailed(1, "x"))
    story.outlast()  # its processes do not end
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.NO_ANSWER)
    assert story.ask(Order.RETRY) == [EndAttempt(1)]
    story.over()
    assert story.sleep() == [Spawn(2), ReadInfo()]


def test_what_could_not_be_ended_is_waited_for_after_an_adoption_too() -> None:
    story = Story().attaching().outlast().outlast()
    assert (story.record.reason, story.record.pending) == (Reason.NO_ANSWER, True)
    story.tell(story.read(DevState.LIVE, OTHER))
    assert story.is_in(Phase.WATCHING)
    assert story.tell(ServerExited(OTHER)) == [Cancel(1), EndAttempt(1)]
    end(story)
    assert story.sleep() == [Spawn(2), ReadInfo()]


def test_retry_never_follows_a_half_attached_server_that_hangs() -> None:
    story = Story(Generation.G2).attaching()
    story.outlast().outlast()
    assert (story.record.phase, story.record.reason) == (Phase.FAILED, Reason.NO_ANSWER)
    assert "crash the kernel" in objection(story.record, Order.RETRY, story.policy)
    assert story.ask(Order.RETRY) == []


def test_retry_after_a_refused_start_takes_it_that_somebodys_start_counts(story: Story) -> None:
    story.starting().tell(StartReplied(1, errno.EINVAL), AttemptOver(1))
    assert story.record.reason is Reason.START_REFUSED
    story.ask(Order.RETRY)
    story.tell(Spawned(2, OTHER), Ready(2), story.read(DevState.QUIESCED))
    effects = story.tell(StartReplied(2, errno.EINVAL))
    g2 = story.policy.generation is Generation.G2
    assert effects == ([WriteLine(2), SendEnd(2, OTHER.pid)] if g2 else [EndAttempt(2)])


def test_recover_does_not_wait(story: Story) -> None:
    story.policy = replace(story.policy, grace_s=60)
    story.watching().tell(ServerExited(OLD))
    assert story.ask(Order.RECOVER) == [Spawn(1), ReadInfo()]


def test_recover_takes_up_what_was_never_seen_live(story: Story) -> None:
    story.policy = replace(story.policy, seen_live=False)
    story.tell(story.read(DevState.QUIESCED))
    assert story.ask(Order.RECOVER) == [Spawn(1), ReadInfo()]


@pytest.mark.parametrize("begin", PHASES)
def test_forget_takes_the_hands_off_and_recover_puts_them_back(story: Story, begin: str) -> None:
    getattr(story, begin)()
    if begin == "attaching" and story.policy.generation is Generation.G2:
        assert "wedge" in objection(story.record, Order.FORGET, story.policy)
        return
    story.ask(Order.FORGET)
    if story.is_in(Phase.STOPPING):
        story.tell(story.read(DevState.LIVE, OTHER))  # whatever happens meanwhile
        end(story)
    story.tell(story.read(DevState.LIVE, OTHER))
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.FORGOTTEN)
    assert story.ask(Order.RECOVER) == [ReadInfo()]
    story.tell(story.read(DevState.LIVE, OTHER))
    assert (story.record.phase, story.record.server) == (Phase.WATCHING, OTHER)


def test_a_forgotten_device_that_does_not_die_stays_forgotten(story: Story) -> None:
    story.draining().ask(Order.FORGET)
    story.outlast()
    story.tell(story.read(DevState.QUIESCED))
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.FORGOTTEN)


# --- the host's end ------------------------------------------------------------------------------


def shut(story: Story) -> list[Effect]:
    story.policy = replace(story.policy, shutting_down=True)
    return story.tell(ShutdownBegun())


@pytest.mark.parametrize("begin", PHASES)
def test_shutdown_begins_nothing_and_breaks_nothing_off_behind_start(
    story: Story, begin: str
) -> None:
    getattr(story, begin)()
    phase, effects = story.record.phase, shut(story)
    if begin == "draining":
        assert effects == [EndAttempt(1)]
        story.over()
        assert (story.record.phase, story.record.reason) == (Phase.HELD, Reason.SHUTDOWN)
    else:
        assert (story.record.phase, effects) == (phase, [])


def test_what_waits_for_time_is_held_at_shutdown(story: Story) -> None:
    story.draining().tell(SpawnFailed(1, "x"), AttemptOver(1))
    assert shut(story) == []
    assert (story.record.phase, story.record.reason) == (Phase.HELD, Reason.SHUTDOWN)


def test_a_pause_that_ends_before_the_news_begins_nothing(story: Story) -> None:
    story.draining().tell(SpawnFailed(1, "x"), AttemptOver(1))
    story.policy = replace(story.policy, shutting_down=True)
    assert story.sleep() == []
    assert story.is_in(Phase.HELD)


def test_a_crash_while_the_host_shuts_down_is_no_outage(story: Story) -> None:
    shut(story.watching())
    assert story.tell(ServerExited(OLD)) == []
    assert (story.record.phase, story.record.reason) == (Phase.HELD, Reason.SHUTDOWN)


def test_nothing_is_stopped_while_the_host_shuts_down(story: Story) -> None:
    story.policy = replace(story.policy, on_exhausted=Exhausted.FAIL)
    shut(story.failed())
    assert story.is_in(Phase.HELD)
    assert story.tell(*[story.read(DevState.QUIESCED)] * 3) == []


def test_who_had_a_recovery_begin_is_known_until_the_next_outage(story: Story) -> None:
    story.failed()
    assert story.record.asked_by == ""
    story.ask(Order.RETRY)
    assert story.record.asked_by == "me"
    released = Story(story.policy.generation).watching()
    released.ask(Order.HOLD)
    released.tell(ServerExited(OLD))
    assert released.is_in(Phase.HELD)
    released.ask(Order.RELEASE)
    assert (released.record.phase, released.record.asked_by) == (Phase.DRAINING, "me")
    again = Story(story.policy.generation).watching()
    again.record = replace(again.record, asked_by="me")
    again.tell(ServerExited(OLD))
    assert again.record.asked_by == "", "nobody asked for this one"
