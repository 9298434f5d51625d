"""A TCP relay that lets through so many bytes per second in all: a network slower than loopback."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

_PIECE = 64 * 1024


class _Bucket:
    """Tokens for bytes, shared by all connections; at most a tenth of a second saved up."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    def spend(self, data: bytes) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.1) + len(data) / self._rate
            delay = self._free_at - now
        if delay > 0:
            time.sleep(delay)


def _relay(source: socket.socket, target: socket.socket, look: Callable[[bytes], None]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_PIECE):
            look(data)
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def slow_proxy(port: int, bytes_per_second: float, *, requests: list[bytes] | None = None) -> Iterator[str]:
    """Relay to ``127.0.0.1:port``; give the proxy's URL. The heads of requests are added to ``requests``."""
    heads = [] if requests is None else requests
    bucket = _Bucket(bytes_per_second)
    listener = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                ends.extend((client, server))
                threading.Thread(target=_relay, args=(client, server, heads.append), daemon=True).start()
                threading.Thread(target=_relay, args=(server, client, bucket.spend), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
        for end in ends:
            end.close()
