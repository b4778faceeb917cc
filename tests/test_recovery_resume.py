"""The machine, fact by fact: our own death, in every phase. Rule 11."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from stories import NEW, OLD, OTHER, Story

from ublkwatch.events import (
    AttemptOver,
    EndAttempt,
    Kill,
    ReadInfo,
    Resumed,
    SendEnd,
    SendStart,
    SendStop,
    ServerAils,
    ServerExited,
    Spawn,
    Spawned,
    SpawnFailed,
    StartReplied,
    Watch,
    WriteLine,
)
from ublkwatch.model import (
    Ailment,
    Armed,
    Attach,
    Exhausted,
    Generation,
    Order,
    Phase,
    Reason,
)
from ublkwatch.uapi import DevState

# --- our own death -------------------------------------------------------------------------------


def test_resumed_while_watching_looks_and_watches(story: Story) -> None:
    assert story.watching().tell(Resumed(None)) == [Watch(OLD), ReadInfo()]


def test_resumed_while_draining_goes_on_with_the_server_that_was_found(story: Story) -> None:
    story.draining()
    assert story.tell(Resumed(NEW)) == [Watch(NEW), ReadInfo()]
    assert story.tell(story.read(DevState.QUIESCED)) == [SendStart(1)]
    assert [wish for wish in story.wishes if isinstance(wish, Spawn)] == [Spawn(1)]


def test_resumed_while_draining_starts_a_server_where_none_was_found(story: Story) -> None:
    assert story.draining().tell(Resumed(None)) == [Spawn(2), ReadInfo()]
    assert story.record.failures == ()  # it was not the server's fault


@pytest.mark.parametrize("error", [0, errno.EINVAL])
def test_resumed_while_starting_asks_again_and_believes_g2s_einval(error: int) -> None:
    story = Story(Generation.G2).starting()
    assert story.tell(Resumed(NEW)) == [Watch(NEW), SendStart(1)]
    assert story.tell(StartReplied(1, error)) == [WriteLine(1), SendEnd(1, NEW.pid)]


def test_resumed_while_attaching_says_line_and_end_again(story: Story) -> None:
    effects = story.attaching().tell(Resumed(NEW))
    assert effects == [Watch(NEW), WriteLine(1), SendEnd(1, NEW.pid)]


def test_resumed_while_attaching_without_its_server_is_half_attached_on_g2(story: Story) -> None:
    assert story.attaching().tell(Resumed(None)) == [EndAttempt(1)]
    story.tell(AttemptOver(1))
    g2 = story.policy.generation is Generation.G2
    assert story.record.phase is (Phase.FAILED if g2 else Phase.BACKOFF)


def test_resumed_in_backoff_waits_anew(story: Story) -> None:
    story.draining().tell(SpawnFailed(1, "x"), AttemptOver(1))
    story.now += 3600
    story.tell(Resumed(None))
    assert story.record.wake is not None
    assert story.record.wake > story.now
    assert story.sleep() == [Spawn(2), ReadInfo()]


def test_resumed_while_starting_without_its_server_fails_the_attempt(story: Story) -> None:
    assert story.starting().tell(Resumed(None)) == [EndAttempt(1)]
    assert story.record.armed is Armed.UNSURE


def test_resumed_where_start_attaches_sends_end_again(story: Story) -> None:
    story.policy = replace(story.policy, attach=Attach.START)
    story.watching().tell(ServerExited(OLD), story.read(DevState.QUIESCED), StartReplied(1, 0))
    story.tell(Spawned(1, NEW))
    assert story.tell(Resumed(NEW)) == [Watch(NEW), SendEnd(1, NEW.pid)]


def test_resumed_in_probation_looks_again(story: Story) -> None:
    assert story.probation().tell(Resumed(None)) == [Watch(NEW), ReadInfo()]
    assert story.record.wake == story.now + story.policy.probation_s


def test_resumed_while_stopping_goes_on_ending(story: Story) -> None:
    story.draining().tell(SpawnFailed(1, "x"))
    assert story.tell(Resumed(None)) == [EndAttempt(1)]


def test_resumed_in_grace_gives_it_anew(story: Story) -> None:
    story.policy = replace(story.policy, grace_s=5)
    story.watching().tell(ServerExited(OLD))
    story.tell(Resumed(None), after_s=100)
    assert story.record.wake == story.now + 5


def test_resumed_while_held_is_held(story: Story) -> None:
    story.watching().ask(Order.HOLD)
    story.tell(ServerExited(OLD))
    assert story.tell(Resumed(None)) == [ReadInfo()]
    assert story.is_in(Phase.HELD)


def test_resumed_after_a_shutdown_that_did_not_happen_begins(story: Story) -> None:
    story.policy = replace(story.policy, shutting_down=True)
    story.watching().tell(ServerExited(OLD))
    story.policy = replace(story.policy, shutting_down=False)
    assert story.tell(Resumed(None)) == [Spawn(1), ReadInfo()]


def test_resumed_while_deciding_holds(story: Story) -> None:
    story.policy = replace(story.policy, on_exhausted=Exhausted.EXEC)
    story.failed().tell(Resumed(None))
    assert story.is_in(Phase.FAILED)


def test_resumed_while_failing_looks_before_it_stops(story: Story) -> None:
    story.policy = replace(story.policy, on_exhausted=Exhausted.FAIL)
    story.failed()
    assert story.tell(Resumed(None)) == [ReadInfo()]
    assert story.tell(*[story.read(DevState.QUIESCED)] * 2) == [SendStop(1)]


def test_resumed_after_giving_up_only_looks(story: Story) -> None:
    assert story.failed().tell(Resumed(OTHER)) == [ReadInfo()]
    assert (story.record.phase, story.record.candidate) == (Phase.FAILED, None)


def test_resumed_with_a_crippled_server_ends_it(story: Story) -> None:
    story.watching().tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "queue 0", 999.0))
    assert story.tell(Resumed(None)) == [Watch(OLD), Kill(OLD), ReadInfo()]


@pytest.mark.parametrize("begin", ["watching", "draining", "attaching", "probation", "failed"])
def test_resumed_without_a_spec_takes_the_hands_off(story: Story, begin: str) -> None:
    getattr(story, begin)()
    story.policy = replace(story.policy, has_spec=False)
    effects = story.tell(Resumed(None))
    assert not [e for e in effects if isinstance(e, Spawn | SendStart | SendEnd)]
    if story.is_in(Phase.STOPPING):
        story.over()
    story.tell(story.read(DevState.QUIESCED))
    assert (story.record.phase, story.record.reason) == (Phase.OBSERVED, Reason.NO_SPEC)
