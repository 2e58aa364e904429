"""Pipe - letters between a site and its worker process, over a socket that both ends inherit.

A letter is a frame: eight bytes with the length of the facts, the facts as JSON (with the sizes of the byte strings),
then the byte strings. The other end is a process of the same installation, so sizes are bounded and nothing is hashed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

from fedllm.core.errors import DecodeError
from fedllm.engine.nvflare.parts import META_LIMIT, Letter

ATONCE = 2**30
"""Bytes of one call of the system, which takes less than 2 GiB."""


class Closed(Exception):
    """The other end is gone."""


class Pipe:
    """One end of a connection; letters may be sent from several threads."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._sending = threading.Lock()

    def send(self, letter: Letter) -> None:
        """Send a letter; raises :class:`Closed` where nobody is there."""
        facts = json.dumps({"sizes": [len(blob) for blob in letter.blobs], "meta": letter.meta}).encode()
        try:
            with self._sending:
                self.end.sendall(len(facts).to_bytes(8, "little") + facts)
                for blob in letter.blobs:
                    self.end.sendall(blob)
        except OSError as fault:
            raise Closed(str(fault)) from fault

    def receive(self) -> Letter:
        """Wait for a letter; raises :class:`Closed` where nobody is there any more."""
        length = int.from_bytes(self._exactly(8), "little")
        if length > META_LIMIT:
            raise DecodeError(f"A frame claims facts of {length} bytes.", f"At most {META_LIMIT} are allowed.")
        facts: dict[str, Any] = json.loads(self._exactly(length))
        return Letter(facts["meta"], [self._exactly(int(size)) for size in facts["sizes"]])

    def close(self) -> None:
        """End the connection, also under a thread that waits for a letter."""
        with contextlib.suppress(OSError):  # it is closed already
            self.end.shutdown(socket.SHUT_RDWR)
        self.end.close()

    def _exactly(self, size: int) -> bytes:
        """So many bytes; as a rule one call of the system gives them all, without a copy."""
        found, left = list[bytes](), size
        while left:
            try:
                piece = self.end.recv(min(left, ATONCE), socket.MSG_WAITALL)
            except OSError as fault:
                raise Closed(str(fault)) from fault
            if not piece:
                raise Closed("the other end is gone")
            found.append(piece)
            left -= len(piece)
        return b"".join(found)
