"""The process that talks to object stores, for ``remote``: one thread per connection, each a call at a time.

    python -m modelfs.origins.process LEVEL FORMAT MEMORY CONTROL CONNECTION...

The numbers are inherited descriptors: the shared memory, the connection on which calls are broken off and whose
end is ours, and those on which calls come. Bodies go where the other side says, slice by slice; it may end a call
between slices. Trusts the other side, which started it.
"""

import contextlib
import functools
import itertools
import logging
import os
import pickle
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from modelfs.config import OriginConfig
from modelfs.errors import ConfigError, ModelfsError, OriginError, TransientOriginError
from modelfs.logs import setup_logging
from modelfs.memory import Memory
from modelfs.origins import Count, Origin
from modelfs.origins.places import make_origin
from modelfs.origins.remote import ABORT, COUNT, DONE, FAILED, FILLED, PAGE, PLACE
from modelfs.threads import in_background

log = logging.getLogger(__name__)

_PAGE_OBJECTS = 1000


class _EndedError(Exception):
    """The other side wants no more of this call."""


class RemoteSink:
    """A sink on the other side of a connection; see ``Sink``."""

    def __init__(self, connection: Connection, memory: Memory) -> None:
        self._connection = connection
        self._memory = memory
        self.filled = 0
        self.abort: Callable[[], None] | None = None

    def space(self) -> memoryview:
        """Report what has been filled, and receive the next place."""
        self._connection.send_bytes(bytes((FILLED,)) + COUNT.pack(self.filled))
        self.filled = 0
        offset, length = PLACE.unpack(self._connection.recv_bytes())
        if not length:
            raise _EndedError
        return self._memory.view(offset, offset + length)

    def advance(self, count: int) -> None:
        """Keep the count for the next report."""
        self.filled = count

    def connected(self, abort: Callable[[], None]) -> None:
        """Take the means to break off."""
        self.abort = abort


class Server:
    """Answers calls.

    Args:
        memory: Where bodies go.
        connections: Where calls come from.
        make: Makes what answers them, by place.
    """

    def __init__(
        self, memory: Memory, connections: list[Connection], make: Callable[[str, OriginConfig, Count], Origin]
    ) -> None:
        self._memory = memory
        self._make = make
        self._connections = connections
        self._running: dict[int, tuple[int, RemoteSink]] = {}
        self._origins: dict[tuple[str, OriginConfig], Origin] = {}
        self._lock = threading.Lock()
        self._counts_lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def run(self, control: Connection) -> None:
        """Answer until the other side is gone."""
        for slot, connection in enumerate(self._connections):
            threading.Thread(target=self._serve, args=(slot, connection), daemon=True).start()
        while True:
            request = control.recv_bytes()
            control.send_bytes(request)
            slot, number = ABORT.unpack(request)
            running = self._running.get(slot)
            if running is not None and running[0] == number and running[1].abort is not None:
                with contextlib.suppress(OSError, ValueError):
                    running[1].abort()

    def _serve(self, slot: int, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, *request = connection.recv()
                sink = RemoteSink(connection, self._memory)
                self._running[slot] = number, sink
                answer = in_background(functools.partial(self._answer, connection, sink, *request))
                del self._running[slot]
                connection.send_bytes(answer)

    def _answer(
        self,
        connection: Connection,
        sink: RemoteSink,
        place: str,
        config: OriginConfig,
        name: str,
        *request: Any,  # noqa: ANN401
    ) -> bytes:
        """Do what a call asks for; return its last message, whatever happens: someone waits for it."""
        try:
            result = self._do(self._origin(place, config, name), connection, sink, *request)
        except _EndedError:
            result = None
        except ModelfsError as error:
            return self._last(FAILED, (type(error).__name__, error.what, error.mend))
        except EOFError:
            raise  # the other side is gone
        except Exception as error:
            log.exception("a call for %s failed", place)
            return self._last(FAILED, (OriginError.__name__, f"reading {place} failed ({error!r:.200})", ""))
        return self._last(DONE, result)

    def _do(self, origin: Origin, connection: Connection, sink: RemoteSink, kind: str, *arguments: Any) -> object:  # noqa: ANN401
        if kind == "read":
            info, span = arguments
            origin.read_into(info, span, sink)
            return sink.filled
        if kind == "list":
            objects = origin.list(*arguments)
            while page := list(itertools.islice(objects, _PAGE_OBJECTS)):
                connection.send_bytes(bytes((PAGE,)) + pickle.dumps(page))
            return None
        if kind == "digest":
            return origin.digest(*arguments)
        if kind == "get_small":
            return origin.get_small(*arguments)
        if kind == "put_small":
            origin.put_small(*arguments)
            return None
        return origin.name

    def _origin(self, place: str, config: OriginConfig, name: str) -> Origin:
        """Return the origin; ``name`` is what it was called at the mount, nothing at that time.

        It may be made long after the mount, when the configuration is being written or means another store.
        """
        with self._lock:
            if (place, config) not in self._origins:
                try:
                    made = self._make(place, config, self._count)
                except ConfigError as error:
                    if not name:
                        raise
                    raise TransientOriginError(error.what, error.mend) from error
                if name and made.name != name:
                    raise TransientOriginError(
                        f"the configuration leads to {made.name} now, at the mount it was {name}",
                        "mount again to use it",
                    )
                self._origins[place, config] = made
            return self._origins[place, config]

    def _count(self, what: str, label: str, amount: int) -> None:
        with self._counts_lock:
            self._counts[what, label] += amount

    def _last(self, kind: int, result: object) -> bytes:
        with self._counts_lock:
            counts, self._counts = dict(self._counts), Counter()
        return bytes((kind,)) + pickle.dumps((counts, result))


def main(words: list[str], make: Callable[[str, OriginConfig, Count], Origin] = make_origin) -> None:
    """Serve until the other side is gone.

    Args:
        words: What stands on the command line.
        make: Makes what answers the calls, by place.
    """
    level, form, memory, control, *connections = words
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole group; the other side decides
    setup_logging(level, form)
    server = Server(Memory(int(memory)), [Connection(int(number)) for number in connections], make)
    with contextlib.suppress(EOFError, OSError):
        server.run(Connection(int(control)))
    os._exit(0)  # threads may be waiting for the network


if __name__ == "__main__":
    main(sys.argv[1:])
