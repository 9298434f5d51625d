"""Origins whose work is done in processes of their own; see ``process`` for the other side.

The SDK, and TLS with a return to the interpreter for every record of 16 KiB, contend with each other and with the
loop for the interpreter lock: one process takes in 0.5 GB/s (``bench/ceiling.py``). And the SDK's import, a third
of a start, goes on beside ours. Bodies are received into memory that both sides share; nothing is copied.

A call occupies one connection to one process for as long as it lasts. A process that ends is replaced; what it
was doing fails as a broken network would, and is resumed by whoever asked. Threads: callable from any.
"""

import contextlib
import itertools
import logging
import pickle
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from modelfs import errors
from modelfs.chunks import ByteRange, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.digests import Digest
from modelfs.errors import ModelfsError, TransientOriginError
from modelfs.memory import Memory
from modelfs.origins import Count, Sink

log = logging.getLogger(__name__)

ABORT = struct.Struct("=IQ")
"""On the control connection: break off call number N of connection I."""
PLACE = struct.Struct("=QQ")
"""To a process that asks for space: offset and length in the shared memory; a length of 0 ends the call."""
COUNT = struct.Struct("=Q")
"""After ``FILLED``: bytes received into the last place."""
FILLED, PAGE, DONE, FAILED = b"FPDX"
"""What a message from the process is, in its first byte."""

PROGRAM = (sys.executable, "-m", "modelfs.origins.process")
REACTION_SECONDS = 2.0
"""A process that has not taken notice of a broken-off call for so long, when another is, hangs."""
WAIT_SECONDS = 60.0
"""Longest wait for a free connection: there are more of them than downloads."""


@dataclass(slots=True, eq=False)
class _Process:
    """One process and the connections to it that are free."""

    handle: subprocess.Popen[bytes]
    control: Connection
    free: list[tuple[int, Connection]]
    busy: int = 0
    unheard_since: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def abort(self, slot: int, number: int) -> None:
        """Break off a call; end a process that has not taken notice of an earlier time."""
        with self.lock, contextlib.suppress(OSError, EOFError):
            while self.control.poll():
                self.control.recv_bytes()
                self.unheard_since = 0.0
            now = time.monotonic()
            self.unheard_since = self.unheard_since or now
            if now - self.unheard_since > REACTION_SECONDS:
                self.handle.kill()
            self.control.send_bytes(ABORT.pack(slot, number))


class Processes:
    """The processes that talk to object stores.

    Args:
        memory: Where bodies go.
        count: How many processes.
        calls: Calls at once, in all of them together.
        logging: Level and format; see ``setup_logging``.
        program: What each of them executes.
    """

    def __init__(
        self, *, memory: Memory, count: int, calls: int, logging: tuple[str, str], program: Sequence[str] = PROGRAM
    ) -> None:
        self._program = program
        self.memory = memory
        self._calls_each = -(-calls // count)
        self._logging = logging
        self._numbers = itertools.count(1)
        self._freed = threading.Condition()
        self._processes = [self._start() for _ in range(count)]

    def _start(self) -> _Process:
        pairs = [Pipe() for _ in range(1 + self._calls_each)]
        theirs = [pair[1] for pair in pairs]
        descriptors = [self.memory.descriptor, *(connection.fileno() for connection in theirs)]
        handle = subprocess.Popen(
            [*self._program, *self._logging, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
        )
        for connection in theirs:
            connection.close()
        control, *free = (pair[0] for pair in pairs)
        return _Process(handle, control, list(enumerate(free)))

    @property
    def pids(self) -> list[int]:
        """The processes, for who measures or kills them."""
        return [process.handle.pid for process in self._processes]

    def stop(self) -> None:
        """End all processes."""
        with self._freed:
            ending, self._processes = self._processes, []
        for process in ending:
            process.handle.kill()
            process.handle.wait()
            process.control.close()

    @contextlib.contextmanager
    def call(self, *request: object) -> Iterator["Call"]:
        """Send a request to the process with the fewest; the call must be followed to its end.

        Raises:
            TransientOriginError: The process has ended, or all have been busy for too long.
        """
        with self._freed:
            self._freed.wait_for(
                lambda: not self._processes or any(process.free for process in self._processes), WAIT_SECONDS
            )
            for process in [one for one in self._processes if one.handle.poll() is not None]:
                self._replace(process)
            if not any(process.free for process in self._processes):
                raise TransientOriginError("no process that downloads is free")
            process = min((one for one in self._processes if one.free), key=lambda one: one.busy)
            slot, connection = process.free.pop()
            process.busy += 1
        call = Call(process, slot, connection, next(self._numbers))
        try:
            connection.send((call.number, *request))
            yield call
        except (EOFError, OSError) as error:
            self._replace(process)
            raise TransientOriginError("a process that downloads has ended and was started again") from error
        except BaseException:
            self._replace(process)  # nobody knows what it would say next
            raise
        finally:
            with self._freed:
                process.busy -= 1
                process.free.append((slot, connection))
                self._freed.notify()

    def _replace(self, process: _Process) -> None:
        with self._freed:
            if process not in self._processes:
                return
            log.warning("process %d, which downloads, has ended: starting another", process.handle.pid)
            process.handle.kill()
            process.handle.wait()
            self._processes[self._processes.index(process)] = self._start()
            self._freed.notify_all()


class Call:
    """One request and its answers."""

    def __init__(self, process: _Process, slot: int, connection: Connection, number: int) -> None:
        self._process = process
        self._slot = slot
        self._connection = connection
        self.number = number

    def abort(self) -> None:
        """Break off the wait for the network."""
        self._process.abort(self._slot, self.number)

    def receive(self) -> bytes:
        """Return the next message."""
        return self._connection.recv_bytes()

    def grant(self, offset: int, length: int) -> None:
        """Tell the process where to put what comes next; with no length, end the call."""
        self._connection.send_bytes(PLACE.pack(offset, length))


class RemoteOrigin:
    """One place, behind ``processes``; see ``Origin``.

    Args:
        place: Where it is; see ``places``.
        config: Endpoint, region, profile, addressing.
        processes: Who does the work.
        count: Takes the counts of requests, bytes and failures.

    Raises:
        ConfigError: The configuration cannot be used.
    """

    def __init__(self, *, place: str, config: OriginConfig, processes: Processes, count: Count) -> None:
        self._place = place
        self._config = config
        self._processes = processes
        self._count = count
        self.name = ""
        self.name = self._ask("name")

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``Origin.list``."""
        pages: list[list[ObjectInfo]] = []
        self._ask("list", prefix, take=pages.append)
        return itertools.chain.from_iterable(pages)

    def get_small(self, key: str, limit: int) -> bytes | None:
        """See ``Origin.get_small``."""
        data: bytes | None = self._ask("get_small", key, limit)
        return data

    def put_small(self, key: str, data: bytes) -> None:
        """See ``Origin.put_small``."""
        self._ask("put_small", key, data)

    def digest(self, info: ObjectInfo) -> Digest | None:
        """See ``Origin.digest``."""
        digest: Digest | None = self._ask("digest", info)
        return digest

    def read_into(self, info: ObjectInfo, span: ByteRange, sink: Sink) -> None:
        """See ``Origin.read_into``; the sink's space lies in the shared memory."""
        given_up: BaseException | None = None
        with self._processes.call(self._place, self._config, self.name, "read", info, span) as call:
            sink.connected(call.abort)  # by breaking off it is noticed that the process hangs, from now on
            while (message := call.receive())[0] == FILLED:
                (count,) = COUNT.unpack_from(message, 1)
                try:
                    if count:
                        sink.advance(count)
                    space = sink.space()
                except BaseException as error:  # noqa: BLE001 - raised when the process has let go of the memory
                    given_up = error
                    call.grant(0, 0)
                else:
                    call.grant(self._processes.memory.offset(space), len(space))
        count = self._finish(message, given_up)
        if count:
            sink.advance(count)

    def _ask(self, *request: object, take: Callable[[Any], object] = lambda page: None) -> Any:  # noqa: ANN401
        with self._processes.call(self._place, self._config, self.name, *request) as call:
            while (message := call.receive())[0] == PAGE:
                take(pickle.loads(message[1:]))
        return self._finish(message)

    def _finish(self, message: bytes, given_up: BaseException | None = None) -> Any:  # noqa: ANN401
        """Take the last message of a call: counts, and a result or an error to raise; ``given_up`` before either."""
        counts, result = pickle.loads(message[1:])
        for (what, label), amount in counts.items():
            self._count(what, label, amount)
        if given_up is not None:
            raise given_up
        if message[0] == FAILED:
            name, what, mend = result
            kind: type[ModelfsError] = getattr(errors, name)
            raise kind(what, mend)
        return result
