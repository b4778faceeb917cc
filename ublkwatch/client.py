"""The operator's side of the socket: asks the ublkwatch that runs. Synchronous, and light.

    answer = Client(Path("/run/ublkwatch")).ask(Request(Order.HOLD, 3, reason="new disk"))

The command line has no other way in, and other programs need none.
"""

from __future__ import annotations

import socket
from pathlib import Path

from ublkwatch.wire import MESSAGE_MAX, NAME, Answer, Wish, understood

PATIENCE_S = 15.0  # longer than whatever the other side takes ...
DEED_S = 120.0  # ... but for a stop or a drill


class Client:
    """Hands requests to the ublkwatch of a runtime directory, a connection for each."""

    def __init__(self, runtime_dir: Path) -> None:
        self._path = str(runtime_dir / NAME)

    def ask(self, wish: Wish, patience_s: float = PATIENCE_S) -> Answer:
        """Return what became of it.

        FileNotFoundError and ConnectionRefusedError: none runs. PermissionError: it is not for us.
        TimeoutError: no answer came. ConnectionError: none that could be understood.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(patience_s)
            connection.connect(self._path)
            connection.sendall(wish.line())
            with connection.makefile("rb") as answers:
                return understood(answers.readline(MESSAGE_MAX))
