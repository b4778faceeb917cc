"""The machine, fact by fact: each rule at the head of recovery.py has its story here."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from ublkwatch.events import (
    AttemptOver,
    Cancel,
    Effect,
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
    Resumed,
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
    DevInfo,
    Generation,
    Phase,
    Policy,
    Reason,
    Record,
    ServerId,
)
from ublkwatch.recovery import delayed, step
from ublkwatch.status import explanation
from ublkwatch.uapi import DevFlags, DevState

BOOT = "boot"
OLD, NEW, OTHER = (ServerId(pid, pid * 10, BOOT) for pid in (100, 200, 300))
INFO = DevInfo(
    dev_id=0,
    state=DevState.LIVE,
    flags=DevFlags.USER_RECOVERY | DevFlags.USER_RECOVERY_REISSUE,
    nr_hw_queues=2,
    queue_depth=32,
    max_io_buf_bytes=1 << 19,
    ublksrv_pid=100,
)


class Story:
    """A device's life: tell it facts, see its phase and what the machine wished for."""

    def __init__(self, generation: Generation = Generation.G3, **policy: float) -> None:
        self.policy = Policy(generation=generation, **policy)  # type: ignore[arg-type]
        self.record = Record(dev_id=0, instance=f"{BOOT}/1")
        self.now = 1000.0
        self.wishes: list[Effect] = []

    def tell(self, *events: Event, after_s: float = 0.0) -> list[Effect]:
        """Return what the last fact made the machine wish for."""
        effects: tuple[Effect, ...] = ()
        for event in events:
            self.now += after_s
            self.record, effects = step(self.record, event, self.now, self.policy)
            self.wishes += effects
        return list(effects)

    def sleep(self) -> list[Effect]:
        """Let the time come that the record asked for."""
        assert self.record.wake is not None
        self.now = max(self.now, self.record.wake)
        return self.tell(Woken())

    def read(
        self, state: DevState | int, server: ServerId | None = None, instance: str = f"{BOOT}/1"
    ) -> InfoRead:
        return InfoRead(replace(INFO, state=state), instance, server)

    def is_in(self, phase: Phase) -> bool:
        return self.record.phase is phase

    def watching(self) -> Story:
        self.tell(self.read(DevState.LIVE, OLD))
        assert self.record.phase is Phase.WATCHING
        return self

    def draining(self) -> Story:
        self.watching().tell(ServerExited(OLD))
        assert self.record.phase is Phase.DRAINING
        return self

    def starting(self) -> Story:
        seq = self.draining().record.seq
        self.tell(Spawned(seq, NEW), Ready(seq), self.read(DevState.QUIESCED))
        assert self.record.phase is Phase.STARTING
        return self

    def attaching(self) -> Story:
        self.starting().tell(StartReplied(self.record.seq, 0))
        assert self.record.phase is Phase.ATTACHING
        return self

    def probation(self) -> Story:
        self.attaching().tell(EndReplied(self.record.seq, 0))
        assert self.record.phase is Phase.PROBATION
        return self


@pytest.fixture(params=[Generation.G2, Generation.G3], ids=["G2", "G3"])
def story(request: pytest.FixtureRequest) -> Story:
    return Story(request.param)


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
    assert effects == [Kill(OLD), Spawn(1), ReadInfo()]
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
        (None, Reason.NOT_READY),
    ],
)
def test_a_server_that_does_not_come_up_costs_an_attempt(
    story: Story, fact: Event | None, reason: Reason
) -> None:
    story.draining()
    story.tell(fact) if fact else story.tell(Woken(), after_s=story.policy.ready_timeout_s)
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


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENODEV, errno.EIO])
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
