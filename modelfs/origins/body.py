"""Receives the bodies of HTTP answers into memory that is lent for it.

Works on the answers of urllib3, which botocore has too. Every receive has a deadline. Used by one thread at a time,
but for ``Body.abort``.
"""

import http.client
import socket
import struct
import time
from typing import Any

import urllib3.exceptions

from modelfs.chunks import ByteRange
from modelfs.errors import TransientOriginError

CONNECT_SECONDS = 5.0
MAX_CONNECTIONS = 64
INACTIVITY_SECONDS = 10.0
"""Longest silence of a socket; a trickle is the fetch engine's to notice, by progress."""
RECEIVE_SECONDS = 4
"""A receive returns with what it has after so long, so that a slow connection shows progress."""
BROKEN = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)
"""What a connection that breaks in the middle of a body raises."""
_BATCH_BYTES = 128 * 1024
_TAIL_BYTES = 4096
"""The end of a body is left to http.client, which then knows that the connection is free."""


class Body:
    """Receives the body of one answer into memory that is lent to it.

    urllib3's readinto would make one more copy of every byte, so http.client's is used; the bulk is taken from the
    socket below it. From a plain one by recv(2) with MSG_WAITALL, which fills a slice in one system call: every
    return to Python is a fight of all downloads for the interpreter lock. Of TLS only a record can be had at a time.
    """

    def __init__(self, response: Any, length: int) -> None:  # noqa: ANN401
        self._response = response._fp
        self._left = length
        sock = getattr(response._connection, "sock", None)
        self._socket: socket.socket | None = sock if isinstance(sock, socket.socket) else None
        # A chunked body has more in it than its bytes.
        self._direct = self._socket is not None and not self._response.chunked and self._response.length == length
        self._plain = self._direct and type(sock) is socket.socket
        self._buffered = -1
        """What came with the headers lies in http.client's buffer and goes first; not looked at yet."""
        if self._plain and self._socket is not None:
            seconds = struct.pack("@ll", RECEIVE_SECONDS, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
            self._socket.settimeout(None)
        self._batch = 1

    def into(self, space: memoryview) -> int:
        """Fill the beginning of ``space``; return the number of bytes, 0 at the end of the body.

        Raises:
            OSError: The connection broke or has been silent for too long.
        """
        if self._buffered < 0:
            self._buffered = len(self._response.fp.peek(1)) if self._direct else 0
        if self._buffered:
            space = space[: self._buffered]
        if self._socket is None or not self._direct or self._buffered or self._left <= _TAIL_BYTES:
            count = int(self._response.readinto(space[: self._left]))
            self._buffered = max(0, self._buffered - count)
        else:
            receive = self._receive if self._plain else _receive_records
            count = receive(self._socket, space[: self._left - _TAIL_BYTES])
            self._response.length -= count
        self._left -= count
        return count

    def _receive(self, sock: socket.socket, space: memoryview) -> int:
        # Wake the thread per batch, not per segment; but never wait for more than the body still has.
        batch = min(len(space), _BATCH_BYTES) if self._left - len(space) > _BATCH_BYTES else 1
        if batch != self._batch:
            self._batch = batch
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, batch)
        deadline = time.monotonic() + INACTIVITY_SECONDS
        while True:
            try:
                return sock.recv_into(space, len(space), socket.MSG_WAITALL)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no byte for {INACTIVITY_SECONDS:.0f} s") from None

    def finish(self) -> None:
        """Leave the connection as it was found, for its next request."""
        sock, self._socket = self._socket, None
        if sock is not None and self._plain:
            sock.settimeout(INACTIVITY_SECONDS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def abort(self) -> None:
        """Break off the wait for the network; callable from any thread.

        The shutdown of ``SSLSocket``, and so urllib3's, would also take off the TLS layer: what is still in the
        socket's queue would then be read as it is, and ciphertext taken for the body.

        Raises:
            OSError: There is no connection (any more).
        """
        sock = self._socket
        if sock is None:
            raise OSError("the body has ended")
        socket.socket.shutdown(sock, socket.SHUT_RD)


def _receive_records(sock: socket.socket, space: memoryview) -> int:
    """Fill ``space`` from a TLS connection, or as much as comes before it is time to show progress."""
    until, count = time.monotonic() + RECEIVE_SECONDS, 0
    while count < len(space) and time.monotonic() < until:
        try:
            received = sock.recv_into(space[count:])
        except OSError:
            if not count:
                raise
            break  # what there is counts; the next call meets the failure again
        if not received:
            break
        count += received
    return count


def check_range(where: str, span: ByteRange, size: int, content_range: str | None, length: int | None) -> None:
    """Make sure that an answer's body is ``span`` of an object of ``size`` bytes.

    Raises:
        TransientOriginError: It says that it is something else.
    """
    expected = f"bytes {span.start}-{span.stop - 1}/{size}"
    whole = content_range is None and len(span) == size
    if content_range != expected and not whole:
        raise TransientOriginError(f"{where}: asked for '{expected}', the store sent '{content_range}'")
    if length not in {None, len(span)}:
        raise TransientOriginError(f"{where}: asked for {len(span)} bytes, the store announced {length}")


def quoted(etag: str) -> str:
    """Return an ETag in its quotes, which some stores leave out in listings (rclone serve s3, Azure)."""
    return etag if etag.startswith(('"', "W/")) else f'"{etag}"'
