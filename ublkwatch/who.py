"""Who serves a device, and in whose care it is, by what /proc and the rules say of its server.

A part of the shell. What is found holds for one life of the device, and until another process
serves it or the rules change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from zlib import crc32

from ublkwatch.care import Care, Origin, Spec
from ublkwatch.model import DevInfo, Phase, Policy, Reason, Record, ServerId
from ublkwatch.perform import Edges
from ublkwatch.rules import Unmanaged

_log = logging.getLogger("ublkwatch")

_TRYING = {Phase.DRAINING, Phase.STARTING, Phase.ATTACHING, Phase.STOPPING, Phase.PROBATION}
Files = Callable[[int], Collection[str]]
_CARE_S = 1.0  # that a look may wait for the rules


class Who:
    """The servers' origins, and the devices' cares."""

    def __init__(
        self,
        edges: Edges,
        policy: Policy,
        specs: dict[int, Spec],
        current: Callable[[int], Record | None],
    ) -> None:
        """``policy`` is for devices in nobody's care; ``specs`` grows as devices are learnt.

        ``current`` returns a device's record of now.
        """
        self._current = current
        self._asking: dict[int, asyncio.Task[None]] = {}  # the rules, about these devices
        self._slow: set[int] = set()  # those of them that take long: said once
        self._edges = edges
        self._policy = policy
        self._specs = specs
        self._cares: dict[int, Care | Unmanaged] = {}
        self._origins: dict[int, tuple[ServerId, Origin]] = {}
        self._policies: dict[int, tuple[Care | Unmanaged | None, bool, int, Policy]] = {}
        self.changes = 0  # of what is known here
        self._stale: set[int] = set()  # devices about which the rules are asked at the next look

    async def serves(
        self, info: DevInfo, record: Record, files: Files | None = None
    ) -> ServerId | None:
        """Return the process that ublksrv_pid names, if it lives and really is the server.

        ``files`` says which files processes have open, as of after that info.
        """
        dev_id, server = info.dev_id, self._identify(info, record, files or self._edges.files)
        seen = self._origins.get(dev_id)
        if server is not None and (seen is None or seen[0] != server):
            self._take_in(server, record)
        care = self._cares.get(dev_id)
        if isinstance(care, Unmanaged) and care.reason is Reason.UNTRUSTED:
            self._stale.add(dev_id)  # until somebody mends what is wrong
        # An attempt goes on as it was begun: another hand-off amid it could wedge a G2 device.
        stale = dev_id in self._stale and record.phase not in _TRYING
        if stale or dev_id not in self._cares:
            await self._find_care(info, record)
        return server

    def cared_for(self, dev_id: int) -> bool:
        """Tell whether it is known in whose care the device is, if in anybody's."""
        return dev_id in self._cares

    def settled(self, dev_id: int) -> Care | Unmanaged | None:
        """Return in whose care a device is; None while the rules are to be asked about it."""
        care, asking = self._cares.get(dev_id), self._asking.get(dev_id)
        if dev_id in self._stale or (asking is not None and not asking.done()):
            return None
        untrusted = isinstance(care, Unmanaged) and care.reason is Reason.UNTRUSTED
        return None if untrusted else care

    async def refresh(self, record: Record) -> None:
        """Ask the rules anew about one device, now."""
        if record.info is not None:
            self._stale.add(record.dev_id)
            await self._find_care(record.info, record)

    async def _find_care(self, info: DevInfo, record: Record) -> None:
        """Ask the rules, which look at files; while those hang, what was known holds."""
        dev_id = info.dev_id
        if (asking := self._asking.get(dev_id)) is None:
            work = self._ask_rules(info, record)
            asking = self._asking[dev_id] = asyncio.get_running_loop().create_task(work)
        done, _ = await asyncio.wait({asking}, timeout=_CARE_S)
        if not done:
            if dev_id not in self._slow:
                _log.warning("ublk %d: the rules about it take long: does a file system hang that "
                             "holds a program of theirs?", dev_id)  # fmt: skip
            self._slow.add(dev_id)
            return
        self._slow.discard(dev_id)
        if self._asking.get(dev_id) is asking:
            del self._asking[dev_id]
        if not asking.cancelled():
            asking.result()  # a bug in a rule harms this device only

    async def _ask_rules(self, info: DevInfo, record: Record) -> None:
        dev_id = info.dev_id
        self._stale.discard(dev_id)
        care = await self._edges.care(info, self.origin(record))
        now = self._current(dev_id)
        if dev_id in self._cares and now is not None and now.phase in _TRYING:
            self._stale.add(dev_id)  # an attempt has begun meanwhile
        elif self._cares.get(dev_id) != care:
            self._cares[dev_id] = care
            self.changes += 1

    def _take_in(self, server: ServerId, record: Record) -> None:
        """Learn what a process is that we see serving for the first time.

        Of one that we started only as whom it runs: by what the device is recognised stays what it
        was, whatever program attaches in its server's place.
        """
        origin, before = self._edges.origin(server.pid), self.origin(record)
        if origin is None:
            return
        ours = server in (record.server, record.candidate) or record.phase in _TRYING
        if ours and before is not None:
            user = {"uid": origin.uid, "gid": origin.gid, "groups": origin.groups}
            origin = replace(before, **user)  # type: ignore[arg-type]
        else:
            self._stale.add(record.dev_id)
        self._origins[record.dev_id] = (server, origin)
        self.changes += 1

    def care(self, dev_id: int) -> Care | None:
        """Return whose care the device is in, if anybody's."""
        care = self._cares.get(dev_id)
        return care if isinstance(care, Care) else None

    def policy(self, dev_id: int, record: Record | None) -> Policy:
        """Return the policy of one device, with what is true of it just now.

        The dice fall once for each attempt: it is asked for with every step.
        """
        care, spec = self._cares.get(dev_id), self._specs.get(dev_id)
        seen_live = bool(spec and record and spec.instance == record.instance)
        seq = record.seq if record else 0
        known = self._policies.get(dev_id)
        if known is None or known[:3] != (care, seen_live, seq):
            policy = self._judge(care, record, seen_live=seen_live)
            known = self._policies[dev_id] = (care, seen_live, seq, policy)
        return known[3]

    def _judge(
        self, care: Care | Unmanaged | None, record: Record | None, *, seen_live: bool
    ) -> Policy:
        chance = self._edges.chance()
        if care is None or isinstance(care, Unmanaged):
            none = care or Unmanaged()
            return replace(
                self._policy,
                has_spec=False,
                hands_off=none.reason,
                hands_off_why=none.detail,
                seen_live=seen_live,
                chance=chance,
            )
        if care.group and record:  # whose devices must not drift apart
            chance = crc32(f"{care.group} {record.attempts}".encode()) / (1 << 32)
        return replace(care.policy, has_spec=True, seen_live=seen_live, chance=chance)

    def origin(self, record: Record) -> Origin | None:
        """Return what the device's server is, or was when the device was LIVE."""
        if (seen := self._origins.get(record.dev_id)) is not None:
            return seen[1]
        spec = self._specs.get(record.dev_id)
        return spec.origin if spec and spec.instance == record.instance else None

    def reconsider(self) -> None:
        """Ask the rules anew, at the next look; the cares of now hold until then."""
        self._stale.update(self._cares)

    def forget(self, dev_id: int) -> None:
        """Take it that the device is gone: the next one of its number is another."""
        self._cares.pop(dev_id, None)
        self._origins.pop(dev_id, None)
        self._policies.pop(dev_id, None)
        self._stale.discard(dev_id)
        if (asking := self._asking.pop(dev_id, None)) is not None:
            asking.cancel()

    def _identify(self, info: DevInfo, record: Record, files: Files) -> ServerId | None:
        """Do not believe the number alone: Linux before 6.17 stores what the server claimed."""
        if record.phase is not Phase.OBSERVED:
            for known in (record.server, record.candidate):
                if known is not None and known.pid == info.ublksrv_pid:
                    return known  # watched by pidfd: its end would have been told
        server = self._edges.servers.identify(info.ublksrv_pid)
        if server and f"/dev/ublkc{info.dev_id}" in files(server.pid):
            return server
        return None
