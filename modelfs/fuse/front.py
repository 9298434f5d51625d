"""The worker's end of the kernel connection.

The front reads requests from the /dev/fuse descriptor. It answers the data path itself: OPEN, READ,
RELEASE; FLUSH, LSEEK and INTERRUPT (ENOSYS), extended attributes that are not ours
(no data). Everything else, the whole namespace, goes unchanged to pyfuse3 over a socket pair, and the
replies come back the same way.

Runs on the trio loop; ``Reply`` objects may be answered from any thread, each exactly once. The front
knows neither chunks nor stores: a ``Handler`` decides what a file is.
"""

import collections
import errno
import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Protocol

import trio

from modelfs.errors import ModelfsError
from modelfs.fuse import protocol
from modelfs.fuse.opens import OpenState, OpenTable
from modelfs.metrics import Metrics

log = logging.getLogger(__name__)

OWN_XATTR_PREFIX = b"user.modelfs."
_CACHED, _PASSED = 0, 1
_MAX_BATCH = 64
"""Requests taken before the loop gets a turn."""
_SPIN_SECONDS = 0.0001
"""ls -l asks two extended attributes of every entry, one at a time; going to sleep between two of them takes
longer than the answer (10 000 entries: 1.2 s, 0.7 s when spinning)."""


class Reply:
    """The one answer to one READ."""

    __slots__ = ("_descriptor", "_front", "done", "unique")

    def __init__(self, front: "Front", descriptor: int, unique: int) -> None:
        self._front = front
        self._descriptor = descriptor
        self.unique = unique
        self.done = False

    def data(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send the bytes of ``parts``; copies them into the reader's pages before it returns."""
        size = protocol.OUT_HEADER.size + sum(map(len, parts))
        self._send([protocol.OUT_HEADER.pack(size, 0, self.unique), *parts])

    def error(self, code: int) -> None:
        """Send the positive errno ``code``."""
        self._front.count_error("read", code)
        self._send([protocol.error_reply(self.unique, code)])

    def _send(self, parts: list[bytes | memoryview]) -> None:
        if self.done:
            raise RuntimeError(f"request {self.unique} answered twice")
        self.done = True
        send(self._descriptor, parts)


class Handler(Protocol):
    """What the front asks of the file system."""

    def open(self, inode: int, *, direct: bool) -> bool:
        """Note that ``inode`` is open, which it may be already; raise ``ModelfsError`` to refuse.

        ``direct``: its reader goes around the page cache (O_DIRECT). Returns whether the kernel may keep what it has
        of the file in its page cache.
        """

    def reopen(self, inode: int) -> None:
        """Note that ``inode`` was opened through a worker before this one."""

    def backing(self, inode: int) -> int | None:
        """Return a descriptor of the complete local file, which the caller closes, or ``None``."""

    def opened(self, inode: int, mode: str) -> None:
        """Tell that the open was answered; mode is ``cached`` or ``passthrough``."""

    def read(self, inode: int, offset: int, length: int, reply: Reply) -> None:
        """Answer ``reply`` now or later; must not block and must not raise."""

    def released(self, inode: int) -> None:
        """Note that the last open of ``inode`` is gone."""


def send(descriptor: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write one message to the kernel; a request nobody waits for any more is not an error.

    Raises:
        OSError: The message is malformed, or the connection is broken in a way that is not an unmount.
    """
    try:
        os.writev(descriptor, parts)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENODEV, errno.ECONNABORTED}:
            raise


class Front:
    """Splits the connection between the handler and pyfuse3.

    Args:
        descriptor: The /dev/fuse descriptor, non-blocking, INIT already answered.
        opens: The table of open files.
        handler: The file system's data path.
        metrics: Counters.
        passthrough: Whether the kernel agreed to passthrough.
    """

    def __init__(
        self, *, descriptor: int, opens: OpenTable, handler: Handler, metrics: Metrics, passthrough: bool
    ) -> None:
        self._descriptor = descriptor
        self._opens = opens
        self._handler = handler
        self._metrics = metrics
        self.passthrough = passthrough
        self._backlog: collections.deque[bytes] = collections.deque()
        self._backlog_filled = trio.Event()
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, self._theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, 4 * 1024 * 1024)
        ours.setblocking(False)
        self._ours = ours
        self._ours.send(protocol.synthetic_init())
        self._calls = {
            protocol.OPEN: self._open,
            protocol.READ: self._read,
            protocol.RELEASE: self._release,
            protocol.GETXATTR: self._getxattr,
        }
        self._request_counts = {
            code: metrics.fuse_requests.labels(op=name) for code, name in protocol.OPCODE_NAMES.items()
        }
        self._other_count = metrics.fuse_requests.labels(op="namespace")

    @property
    def namespace_path(self) -> str:
        """The path to give to ``pyfuse3.init`` as its mountpoint."""
        return f"/dev/fd/{self._theirs.fileno()}"

    def count_error(self, op: str, code: int) -> None:
        """Count an error reply."""
        self._metrics.fuse_errors.labels(op=op, errno=errno.errorcode.get(code, str(code))).inc()

    def restore(self) -> None:
        """Take over what was opened through a worker before this one; to be done before anything is evicted."""
        for inode in self._opens.inodes():
            self._restore(inode)

    async def run(self) -> None:
        """Serve until the file system is unmounted or the connection aborted."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._copy_namespace_replies)
            nursery.start_soon(self._drain_backlog)
            await self._serve()
            nursery.cancel_scope.cancel()

    def _restore(self, inode: int) -> None:
        try:
            self._handler.reopen(inode)
            self._handler.opened(inode, "passthrough" if self._opens.get(inode).passed else "cached")
        except (ModelfsError, OSError) as error:
            log.warning("an open file is gone, its reads fail: %s", error)

    async def _serve(self) -> None:
        buffer = bytearray(protocol.REQUEST_BUFFER_BYTES)
        view = memoryview(buffer)
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            spin_until = 0.0
            for _ in range(_MAX_BATCH):
                try:
                    size = self._receive(buffer, spin_until)
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return
                    if error.errno in {errno.ENOENT, errno.EINTR}:
                        continue  # the request was interrupted while it was handed over
                    raise
                if not size:
                    break
                if self._dispatch(view[:size]) == protocol.GETXATTR:
                    spin_until = time.monotonic() + _SPIN_SECONDS

    def _receive(self, buffer: bytearray, spin_until: float) -> int:
        """Return the size of the next request, 0 if there is none before ``spin_until`` (monotonic seconds)."""
        while True:
            try:
                return os.readv(self._descriptor, [buffer])
            except BlockingIOError:
                if time.monotonic() >= spin_until:
                    return 0

    def _dispatch(self, message: memoryview) -> int:
        """Answer or forward one request; return its opcode."""
        header = protocol.parse_header(message)
        body = message[protocol.IN_HEADER.size :]
        count = self._request_counts.get(header.opcode, self._other_count)
        count.inc()
        call = self._calls.get(header.opcode)
        if call is not None:
            call(header, body, message)
        elif header.opcode in {protocol.FLUSH, protocol.LSEEK, protocol.INTERRUPT}:
            # INTERRUPT comes for any signal, and EINTR for a page would be SIGBUS: reads run to their deadline.
            send(self._descriptor, [protocol.error_reply(header.unique, errno.ENOSYS)])
        elif header.opcode not in {protocol.FORGET, protocol.BATCH_FORGET}:
            # Inode numbers are derived from the objects, so nothing is kept per lookup and nothing to forget.
            self._forward(bytes(message))
        return header.opcode

    # -- the namespace ------------------------------------------------------------------------------

    def _forward(self, message: bytes) -> None:
        if not self._backlog:
            try:
                self._ours.send(message)
            except BlockingIOError:
                pass
            else:
                return
        self._backlog.append(message)
        self._backlog_filled.set()

    async def _drain_backlog(self) -> None:
        while True:
            await self._backlog_filled.wait()
            while self._backlog:
                await trio.lowlevel.wait_writable(self._ours)
                try:
                    self._ours.send(self._backlog[0])
                except BlockingIOError:
                    continue
                self._backlog.popleft()
            self._backlog_filled = trio.Event()

    async def _copy_namespace_replies(self) -> None:
        buffer = bytearray(4 * 1024 * 1024)
        view = memoryview(buffer)
        initialised = False
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            try:
                size = self._ours.recv_into(buffer)
            except BlockingIOError:
                continue
            if not initialised:
                initialised = True  # libfuse's answer to the synthetic INIT; the kernel has had its own
                continue
            if not size:
                raise RuntimeError("pyfuse3 closed its end of the namespace pair")
            send(self._descriptor, [view[:size]])

    # -- the data path ------------------------------------------------------------------------------

    def _open(self, header: protocol.Header, body: memoryview, _message: memoryview) -> None:
        unique = header.unique & ~protocol.UNIQUE_RESEND
        inode = header.nodeid
        flags, _ = protocol.OPEN_IN.unpack_from(body)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._refuse(header, "open", errno.EROFS)
            return
        state = self._opens.get(inode)
        try:
            keep = self._handler.open(inode, direct=bool(flags & os.O_DIRECT))
            if unique != self._opens.last_unique or not (state.cached or state.passed):
                state = self._count_open(unique, inode, state)
        except ModelfsError as error:
            self._refuse(header, "open", error.errno)
            return
        except OSError as error:
            log.error("cannot open inode %d: %s", inode, error)
            if not (state.cached or state.passed):
                self._handler.released(inode)  # the kernel will not say so
            self._refuse(header, "open", errno.ENFILE)
            return
        passed = state.passed > 0
        mode = "passthrough" if passed else "cached"
        reply = protocol.OPEN_OUT.pack(
            inode << 1 | (_PASSED if passed else _CACHED),
            protocol.FOPEN_NOFLUSH
            | (protocol.FOPEN_PASSTHROUGH if passed else protocol.FOPEN_KEEP_CACHE if keep else 0),
            state.backing,
        )
        self._metrics.fuse_opens.labels(mode=mode).inc()
        size = protocol.OUT_HEADER.size + len(reply)
        send(self._descriptor, [protocol.OUT_HEADER.pack(size, 0, header.unique), reply])
        self._handler.opened(inode, mode)

    def _count_open(self, unique: int, inode: int, state: OpenState) -> OpenState:
        if state.passed:
            new = OpenState(0, state.passed + 1, state.backing)
        elif state.cached:
            new = OpenState(state.cached + 1, 0, 0)
        else:
            backing = self._open_backing(inode)
            new = OpenState(0, 1, backing) if backing else OpenState(1, 0, 0)
        self._opens.put(unique, inode, new)
        return new

    def _open_backing(self, inode: int) -> int:
        """Register the complete local file with the kernel; return its backing id or 0."""
        if not self.passthrough:
            return 0
        local = self._handler.backing(inode)
        if local is None:
            return 0
        try:
            # A mutable argument makes ioctl return the kernel's result, which is the backing id.
            request = bytearray(protocol.BACKING_MAP.pack(local, 0, 0))
            return int(fcntl.ioctl(self._descriptor, protocol.DEV_IOC_BACKING_OPEN, request))
        except OSError as error:
            # EPERM without CAP_SYS_ADMIN, ELOOP on a stacked file system: serve by copy from now on.
            self.passthrough = False
            log.warning(
                "passthrough is off, files are served by copy: the kernel refused a backing file (%s)", error.strerror
            )
            return 0
        finally:
            os.close(local)

    def _release(self, header: protocol.Header, body: memoryview, _message: memoryview) -> None:
        unique = header.unique & ~protocol.UNIQUE_RESEND
        inode = header.nodeid
        handle = protocol.RELEASE_IN.unpack_from(body)[0]
        if unique != self._opens.last_unique:
            state = self._opens.get(inode)
            passed = handle & 1 == _PASSED
            new = OpenState(
                state.cached - (not passed and state.cached > 0),
                state.passed - (passed and state.passed > 0),
                state.backing,
            )
            closed = state.backing if not new.passed else 0
            if closed:
                new.backing = 0
            self._opens.put(unique, inode, new)
            if closed:
                self._close_backing(closed)
            if not (new.cached or new.passed):
                self._handler.released(inode)
        send(self._descriptor, [protocol.error_reply(header.unique, 0)])

    def _close_backing(self, backing: int) -> None:
        try:
            fcntl.ioctl(self._descriptor, protocol.DEV_IOC_BACKING_CLOSE, struct.pack("=I", backing))
        except OSError as error:
            log.warning("backing id %d could not be closed: %s", backing, error.strerror)

    def _read(self, header: protocol.Header, body: memoryview, _message: memoryview) -> None:
        _handle, offset, size, *_ = protocol.READ_IN.unpack_from(body)
        self._handler.read(header.nodeid, offset, size, Reply(self, self._descriptor, header.unique))

    def _getxattr(self, header: protocol.Header, body: memoryview, message: memoryview) -> None:
        name = bytes(body[protocol.GETXATTR_IN.size :])
        if name.startswith(OWN_XATTR_PREFIX):
            self._forward(bytes(message))
        else:
            # ls -l asks two of these for every entry; ENODATA is the truth and needs no hop.
            send(self._descriptor, [protocol.error_reply(header.unique, errno.ENODATA)])

    def _refuse(self, header: protocol.Header, op: str, code: int) -> None:
        self.count_error(op, code)
        send(self._descriptor, [protocol.error_reply(header.unique, code)])
