"""The README's lines for pip, and those without systemd, over the real driver.

make image && lab/lab.py run --init systemd -- .venv/bin/python -m pytest tests/kernel/package

The guest has no network: pip takes what `make image` has fetched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import readme
from installed import CONFIG, PATH, TOP, alive, device, patience, run, until, watched

if TYPE_CHECKING:
    from conftest import Servers

WHEELS = TOP / "build/image/wheels"
# Settings of pip's own, and the Python that the tests have: the lines stay as they are.
ENVIRONMENT = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": str(WHEELS),
    "PATH": f"{Path(sys.base_prefix) / 'bin'}:{PATH}",
}


@pytest.mark.timeout(1500)
@patience()
def test_the_readmes_lines_for_pip_and_those_without_systemd(server: Servers, attach: Path) -> None:
    assert list(WHEELS.glob("*.whl")), "make image"
    program = shutil.copy(attach, "/usr/local/sbin/attach")
    creator = server(0)

    run("sh", "-e", "-c", "\n".join(readme.lines("python3 -m venv")), **ENVIRONMENT)
    assert run("systemctl", "is-active", "ublkwatch") == "active"
    assert run("systemctl", "is-enabled", "ublkwatch") == "enabled"
    run("ublkwatch", "register", "ublkb0", "--", program)
    watched(recoveries=0)
    creator.kill()
    kept = watched(recoveries=1)

    run("ublkwatch", "install-systemd", "--remove")
    assert not Path("/etc/systemd/system/ublkwatch.service").exists()
    assert alive(kept)

    load, start = readme.lines("modprobe ublk_drv")
    assert str(CONFIG) in start
    daemon = subprocess.Popen(
        ["sh", "-e", "-c", f"{load}\nexec {start}"], env={"PATH": PATH}, start_new_session=True
    )
    try:
        until(lambda: device(daemon.pid).get("server_pid") == kept, "it takes up what there is")
        daemon.terminate()
        assert daemon.wait(60) == 0
        assert alive(kept)
    finally:
        daemon.kill()
