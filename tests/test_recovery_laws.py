"""Laws of the machine over whatever can be told to it, in any order."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ublkwatch.events import (
    AttemptOver,
    Decided,
    EndReplied,
    Event,
    HoldersFound,
    InfoMissing,
    InfoRead,
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
    StopReplied,
    Woken,
    WriteLine,
)
from ublkwatch.model import Armed, DevInfo, Generation, Phase, Policy, Record, ServerId
from ublkwatch.recovery import step
from ublkwatch.uapi import DevFlags, DevState

SERVERS = [ServerId(pid, pid, "boot") for pid in (100, 200, 300)]
WAITING = {
    *(Phase.DRAINING, Phase.STARTING, Phase.ATTACHING),
    *(Phase.PROBATION, Phase.STOPPING, Phase.BACKOFF),
}
INFO = DevInfo(0, DevState.LIVE, DevFlags.USER_RECOVERY, 1, 1, 4096, 100)

REPLIES = (
    *(Spawned, Ready, SpawnFailed, StartReplied, EndReplied, AttemptOver, HoldersFound),
    *(ServerFound, StopReplied, Decided),
)

servers = st.sampled_from(SERVERS)
errors = st.sampled_from([0, 0, errno.EBUSY, errno.EINVAL, errno.EINTR, errno.ETIMEDOUT, 999])
states = st.sampled_from([*DevState, DevState.LIVE, DevState.QUIESCED, DevState.QUIESCED, 7])
seqs = st.integers(-1, 0)  # relative to the attempt's: its own, or one that is over
instances = st.sampled_from(["boot/1"] * 20 + ["boot/2"])


@dataclass(frozen=True)
class Moment:
    """A fact to come: its number is relative, since the record's is not known yet."""

    event: Event
    after_s: float
    late: int = field(default=0)


facts = st.one_of(
    st.builds(
        lambda state, server, where: InfoRead(replace(INFO, state=state), where, server),
        states,
        st.none() | servers,
        instances,
    ),
    st.builds(ServerExited, servers),
    st.builds(Spawned, st.just(0), servers),
    st.builds(Ready, st.just(0)),
    st.builds(SpawnFailed, st.just(0), st.just("why")),
    st.builds(StartReplied, st.just(0), errors),
    st.builds(EndReplied, st.just(0), errors),
    st.builds(AttemptOver, st.just(0)),
    st.builds(HoldersFound, st.just(0), st.just("who")),
    st.just(Woken()),
    st.just(Woken()),
    st.builds(Resumed, st.none() | servers),
    st.just(InfoMissing()),
)
moments = st.builds(Moment, facts, st.sampled_from([0.0, 0.001, 0.3, 5.0, 100.0]), seqs)
policies = st.builds(
    Policy,
    generation=st.sampled_from(Generation),
    has_spec=st.sampled_from([True, True, True, False]),
    seen_live=st.booleans(),
    attempts_max=st.integers(1, 3),
)


@settings(max_examples=3000, deadline=None)
@given(st.lists(moments, max_size=60), policies)
def test_the_machine_keeps_its_laws(story: list[Moment], policy: Policy) -> None:
    record, now, tried = Record(dev_id=0, instance="boot/1"), 0.0, 0
    for moment in story:
        event = moment.event
        if isinstance(event, REPLIES):
            event = replace(event, seq=record.seq + moment.late)
        now += moment.after_s
        before = record
        record, effects = step(before, event, now, policy)
        assert (record, effects) == step(before, event, now, policy), "deterministic"
        wishes = {type(effect) for effect in effects}

        if record.phase in WAITING:
            assert record.wake is not None, "whoever waits has a deadline"
        if before.phase is Phase.GONE:
            assert (record.phase, effects) == (Phase.GONE, ()), "what is gone stays gone"
        if policy.generation is Generation.UNKNOWN or not policy.has_spec:
            assert record.phase in (Phase.OBSERVED, Phase.GONE), "not ours"
        assert record.seq >= before.seq, "an attempt's number is never used twice"
        if Spawn in wishes:
            assert record.seq == before.seq + 1
            assert before.over or isinstance(event, Resumed) or before.phase not in WAITING, (
                "an attempt begins when the last one is over"
            )
        if SendStart in wishes:
            assert record.candidate
            assert record.armed in (Armed.SENT, Armed.UNSURE), "marked before it is sent"
            assert not (policy.generation is Generation.G2 and record.lined), (
                "no START after a line on G2"
            )
        if SendEnd in wishes:
            assert effects[-2:] == (WriteLine(record.seq), effects[-1]), "END behind the line"
            assert record.armed is Armed.YES, "END only behind an accepted START"
            assert record.candidate
            assert record.lined
            assert not before.pending or isinstance(event, StartReplied | Resumed), "one END"
            if policy.generation is Generation.G2 and not isinstance(event, Resumed):
                assert not before.lined, "no END after a line on G2"
        if record.phase is not Phase.PROBATION and record.phase is not before.phase:
            tried = len(record.failures)
        assert tried <= policy.attempts_max + 1, "attempts are limited"
        if isinstance(event, InfoRead) and event.info.state is DevState.DEAD:
            assert record.phase in (Phase.GONE, Phase.STOPPING), "DEAD is never resurrected"
