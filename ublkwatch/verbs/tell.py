"""`ublkwatch explain`: one device in sentences, from its record; also while the daemon is down."""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ublkwatch import config, explain, foretell, status
from ublkwatch.model import Generation, Phase, Policy, Reason, Record
from ublkwatch.verbs import Exit, clock, document_of, locked, operators, say


def add(verbs: Any, shared: argparse.ArgumentParser, device: argparse.ArgumentParser) -> None:
    """Add this verb to the command line."""
    tell = verbs.add_parser("explain", parents=[shared, device], help="say all about a device")
    tell.set_defaults(verb=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from ublkwatch.store import StoreError, read_record  # noqa: PLC0415 - as in verbs.run

    settings, dev_id = config.load(arguments.config), arguments.dev_id
    running = locked(settings.runtime_dir / "lock")
    try:
        record = read_record(settings.runtime_dir, dev_id)
    except PermissionError:
        only = f"only {operators(settings)} may read its record"
        instead = f"try sudo, or `ublkwatch status {dev_id}`"
        return say(Exit.NO_PERMISSION, f"explain ublkb{dev_id}: {only}; {instead}")
    except StoreError as error:
        return say(Exit.FAILED, f"explain ublkb{dev_id}: {error}")
    document: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # the record says what matters
        document = document_of(settings)
    if record is None or not record.instance.startswith(f"{_boot_id()}/"):
        if not running:
            return say(Exit.NOT_RUNNING, f"ublkb{dev_id}: unknown, and ublkwatch is not running")
        hint = "`ublkwatch status` shows the devices that are"
        return say(Exit.REFUSED, f"ublkb{dev_id}: no such device is known; {hint}")
    record = _completed(record, document)
    times = foretell.Times(time.monotonic(), time.time(), clock)
    policy = _policy(dev_id, document)
    written_at = document.get("written_at")
    print(explain.explain(record, policy, times, running=running, written_at=written_at))
    return Exit.OK if running else Exit.NOT_RUNNING


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _policy(dev_id: int, document: dict[str, Any]) -> Policy:
    """Return the device's policy as the daemon that wrote the document has it."""
    known = Generation.__members__.get(document.get("generation", ""), Generation.UNKNOWN)
    devices = document.get("devices", [])
    care = next((each.get("care") for each in devices if each["dev_id"] == dev_id), None)
    return replace(status.policy_from(care), generation=known)


def _completed(record: Record, document: dict[str, Any]) -> Record:
    """Add what is not saved with a record: the kernel's answer, and that our code failed."""
    for device in document.get("devices", []):
        if device["dev_id"] == record.dev_id:
            record = replace(record, info=status.info_from(device))
            if device["reason"] == Reason.INTERNAL_ERROR.name:
                record = replace(
                    record,
                    phase=Phase.FAILED,
                    reason=Reason.INTERNAL_ERROR,
                    detail=device.get("detail") or "",
                    wake=None,
                )
    return record
