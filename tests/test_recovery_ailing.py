"""The machine, fact by fact: servers that live while I/O hangs in them. Rule 14."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from stories import NEW, OLD, OTHER, Story

from ublkwatch.ailing import bystander
from ublkwatch.events import (
    Effect,
    EndAttempt,
    EndReplied,
    Kill,
    ReadInfo,
    Ready,
    Resumed,
    ServerAils,
    ServerExited,
    ServerWell,
    Spawn,
    Spawned,
    StartReplied,
    Watch,
    Woken,
)
from ublkwatch.model import (
    Ailment,
    Generation,
    Illness,
    Loss,
    Order,
    Phase,
    Record,
    Remedy,
    ServerId,
)
from ublkwatch.orders import objection
from ublkwatch.uapi import DevState

KILL = {"on_stall": Remedy.KILL}


@pytest.fixture(params=[Generation.G2, Generation.G3], ids=lambda generation: generation.name)
def generation(request: pytest.FixtureRequest) -> Generation:
    assert isinstance(request.param, Generation)
    return request.param


@pytest.fixture
def tell(generation: Generation) -> Any:
    return lambda **policy: Story(generation, **policy).watching()


def stall(story: Story, server: ServerId = OLD, *, for_s: float = 30.0) -> list[Effect]:
    """Let its server have completed nothing for that long."""
    story.now += for_s
    return story.tell(ServerAils(server, Ailment.STALL, "it sleeps", story.now - for_s))


def recovered(story: Story) -> ServerId:
    """Bring the device back after its server's end, and into WATCHING."""
    assert story.record.server is not None
    old = story.record.server
    new = ServerId(old.pid + 1, old.start_ticks + 1, old.boot_id)
    story.tell(ServerExited(old))
    seq = story.record.seq
    story.tell(Spawned(seq, new), Ready(seq), story.read(DevState.QUIESCED))
    story.tell(StartReplied(seq, 0), EndReplied(seq, 0))
    story.now += 1
    story.tell(Woken(), story.read(DevState.LIVE, new))
    assert story.is_in(Phase.WATCHING)
    return new


def test_a_stall_is_said_and_nothing_is_done_about_it(tell: Any) -> None:
    story = tell()
    assert stall(story) == []
    assert story.record.ill == Illness(Ailment.STALL, "it sleeps", 1000.0)
    assert story.is_in(Phase.WATCHING)
    assert story.record.failures == ()


def test_a_stall_that_goes_on_keeps_its_beginning_and_learns_its_cause(tell: Any) -> None:
    story = tell()
    stall(story)
    story.tell(ServerAils(OLD, Ailment.STALL, "it is stopped", 1030.0))
    assert story.record.ill == Illness(Ailment.STALL, "it is stopped", 1000.0)


def test_a_stall_that_ends_is_forgotten(tell: Any) -> None:
    story = tell()
    stall(story)
    story.tell(ServerWell(OTHER))
    assert story.record.ill is not None
    story.tell(ServerWell(OLD))
    assert story.record.ill is None


def test_on_stall_kill_ends_the_server_and_the_ordinary_recovery_follows(tell: Any) -> None:
    story = tell(**KILL)
    assert stall(story) == [Kill(OLD)]
    assert stall(story) == []
    story.tell(ServerWell(OLD))
    assert story.record.ill is not None, "what was sent cannot be taken back"
    assert story.tell(ServerExited(OLD)) == [Spawn(1), ReadInfo()]
    assert (story.record.detected_by, story.record.ill) == ("stall", None)


def test_a_crash_of_a_server_that_ailed_is_a_crash(tell: Any) -> None:
    story = tell()
    stall(story)
    story.tell(ServerExited(OLD))
    assert (story.record.detected_by, story.record.detail) == ("pidfd", "")


def test_a_dead_queue_outweighs_a_stall(tell: Any) -> None:
    story = tell()
    stall(story)
    assert story.tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "q1", 1031.0)) == [Kill(OLD)]
    assert stall(story) == []
    assert story.record.ill == Illness(Ailment.DEAD_QUEUE, "q1", 1031.0, condemned=True)


def test_a_dead_queue_may_be_only_said_too(tell: Any) -> None:
    story = tell(on_dead_queue=Remedy.ALERT)
    assert story.tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "q1", 1000.0)) == []
    story.tell(ServerWell(OLD))
    assert story.record.ill is not None, "no request of other queues cures it"


def test_another_process_that_ails_is_nobody_here(tell: Any) -> None:
    story = tell(**KILL)
    assert stall(story, OTHER) == []
    assert story.record.ill is None


def test_a_server_that_stalls_again_and_again_is_not_ended_for_ever(tell: Any) -> None:
    story = tell(**KILL, attempts_max=3, window_s=1.0)
    server = OLD
    for count in range(3):
        assert stall(story, server) == [Kill(server)]
        assert len(story.record.failures) == count + 1
        server = recovered(story)
    assert stall(story, server) == []
    assert story.record.ill == Illness(Ailment.STALL, "it sleeps", story.now - 30.0)
    assert story.is_in(Phase.WATCHING)


def test_who_was_well_for_long_has_the_whole_budget(tell: Any) -> None:
    story = tell(**KILL, attempts_max=1, stable_s=30.0)
    stall(story)
    server = recovered(story)
    story.now += 30.0
    assert stall(story, server) == [Kill(server)]
    assert len(story.record.failures) == 1


def test_who_fails_after_it_was_ended_has_less_left(tell: Any) -> None:
    story = tell(**KILL, attempts_max=2)
    stall(story)
    story.tell(ServerExited(OLD))
    story.tell(Spawned(1, NEW), ServerExited(NEW, "exit status 1", 1))
    story.over()
    assert story.is_in(Phase.FAILED)


def test_held_it_is_said_and_seen_to_at_release(tell: Any) -> None:
    story = tell(**KILL)
    story.ask(Order.HOLD)
    assert stall(story) == []
    assert story.record.ill is not None
    assert story.ask(Order.RELEASE) == [Kill(OLD)]


def test_while_the_host_shuts_down_nobody_is_ended(tell: Any) -> None:
    story = tell(**KILL)
    story.policy = replace(story.policy, shutting_down=True)
    assert stall(story) == []


def test_an_operator_may_have_it_ended(tell: Any) -> None:
    story = tell()
    assert objection(story.record, Order.RECOVER, story.policy)
    stall(story)
    assert objection(story.record, Order.RECOVER, story.policy) == ""
    assert story.ask(Order.RECOVER) == [Kill(OLD)]
    assert "SIGKILL" in objection(story.record, Order.RECOVER, story.policy)
    assert story.ask(Order.RECOVER) == []
    story.tell(ServerExited(OLD))
    assert (story.record.phase, story.record.failures) == (Phase.DRAINING, ())


def test_resumed_with_a_stall_it_is_looked_at_first(tell: Any) -> None:
    story = tell()
    stall(story)
    story.policy = replace(story.policy, on_stall=Remedy.KILL)
    assert story.tell(Resumed(None)) == [Watch(OLD), ReadInfo()]
    assert stall(story) == [Kill(OLD)]


def test_resumed_the_budget_of_who_was_well_for_long_is_whole(tell: Any) -> None:
    story = tell(attempts_max=1)
    story.record = replace(story.record, failures=(story.now,))
    story.now += 1000
    story.tell(Resumed(None))
    assert story.tell(ServerAils(OLD, Ailment.DEAD_QUEUE, "q1", story.now)) == [Kill(OLD)]


def test_a_choice_that_changes_holds_for_what_ails_already(tell: Any) -> None:
    story = tell(on_dead_queue=Remedy.ALERT)
    dead = ServerAils(OLD, Ailment.DEAD_QUEUE, "q1", 1000.0)
    assert story.tell(dead) == []
    story.policy = replace(story.policy, on_dead_queue=Remedy.KILL)
    assert story.tell(dead) == [Kill(OLD)]


def test_a_server_is_spared_while_another_device_must_not_lose_it(tell: Any) -> None:
    story = tell(**KILL)
    story.policy = replace(story.policy, bystander="ublkb1, which is held")
    assert stall(story) == []
    assert story.record.ill is not None
    assert story.record.ill.spared == "ublkb1, which is held"
    assert "ublkb1" in objection(story.record, Order.RECOVER, story.policy)
    story.policy = replace(story.policy, bystander="")
    assert stall(story) == [Kill(OLD)]


def test_who_must_not_lose_a_server(generation: Generation) -> None:
    mine = Story(generation).watching().record
    held = replace(mine, dev_id=1, held=True)
    attaching = replace(mine, dev_id=2, phase=Phase.ATTACHING, server=None, candidate=OLD)
    g2 = generation is Generation.G2
    assert bystander(mine, [mine, replace(mine, dev_id=3)], generation) == ""
    assert bystander(mine, [mine, held], generation) == "ublkb1, which is held"
    assert bystander(replace(mine, held=True), [replace(mine, held=True)], generation) == ""
    assert bystander(mine, [attaching], generation) == (
        "ublkb2, which attaches just now" if g2 else ""
    )
    assert bystander(mine, [replace(held, server=OTHER)], generation) == ""


def test_a_device_that_was_let_go_of_has_no_server_that_ails(tell: Any) -> None:
    story = tell(**KILL)
    story.tell(story.read(DevState.QUIESCED))
    assert stall(story) == []
    assert story.record.ill is None


def test_a_server_that_is_ended_is_not_spared_where_the_kernel_is_first(tell: Any) -> None:
    story = tell(**KILL)
    stall(story)
    story.tell(story.read(DevState.QUIESCED))
    assert Kill(OLD) in story.tell(story.read(DevState.QUIESCED))


def test_resumed_before_it_was_ended_it_is_ended(tell: Any) -> None:
    story = tell(**KILL)
    stall(story)
    failures = story.record.failures
    assert story.tell(Resumed(None)) == [Watch(OLD), Kill(OLD), ReadInfo()]
    assert story.record.failures == failures


def test_in_probation_its_end_is_the_failure_that_counts(generation: Generation) -> None:
    story = Story(generation, **KILL).probation()
    assert stall(story, NEW, for_s=1.0) == [Kill(NEW)]
    assert [len(story.record.failures), story.tell(ServerExited(NEW))] == [0, [EndAttempt(1)]]
    assert len(story.record.failures) == 1
    assert story.record.detail == "it sleeps"


def test_a_server_that_took_over_has_a_clean_slate(tell: Any) -> None:
    story = tell()
    stall(story)
    story.tell(story.read(DevState.LIVE, OTHER))
    assert story.record == replace(
        Record(dev_id=0, instance=story.record.instance),
        phase=Phase.WATCHING,
        since=story.now,
        info=story.record.info,
        server=OTHER,
    )


def test_what_ailed_it_is_why_it_was_lost_and_who_had_it_ended_is_known(tell: Any) -> None:
    story = tell(on_stall=Remedy.KILL)
    story.record = replace(story.record, asked_by="an operator, before")
    stall(story)
    story.tell(ServerExited(OLD, "SIGKILL"))
    assert story.record.loss == Loss(OLD, "it sleeps")
    assert (story.record.detected_by, story.record.asked_by) == ("stall", "")
    story = tell()
    stall(story)
    story.ask(Order.RECOVER)
    story.tell(ServerExited(OLD, "SIGKILL"))
    assert story.record.asked_by == "me"
