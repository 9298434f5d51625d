"""The long-lived process that owns the mount.

It spawns the worker, mounts once the worker says ``prepared`` (so a wrong bucket never leaves a mount
behind; or at once, when something is to start meanwhile), answers the kernel's INIT, hands the descriptor
over a socket, restarts a worker that died or hangs, and alone unmounts. While it lives the mount cannot
become "Transport endpoint is not connected". It imports nothing heavy and allocates little: it must be the
last thing the OOM killer finds.

Messages are JSON datagrams. To the worker: ``start`` (what to serve), ``connect`` (the descriptors).
From the worker: ``prepared``, ``serving``, ``beat``, ``failed`` (one line and an exit code), ``unmounted``.
"""

import contextlib
import ctypes
import dataclasses
import errno
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelfs.errors import FuseUnavailableError, MountpointError
from modelfs.fuse import protocol
from modelfs.fuse.opens import create_table
from modelfs.fuse.tuning import Tuning, mount_at, tune

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""How often a healthy worker says so."""
HANG_SECONDS = 30.0
"""Silence after which a worker is taken for hung: stacks are dumped, then it is killed."""
PREPARE_SECONDS = 120.0
"""Longest time from the worker's start to ``serving``, listings of large prefixes included."""
STOP_SECONDS = 3.0
"""Time a worker gets to commit and leave; the whole unmount stays under 5 s."""
_RESTART_PAUSES = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
_STABLE_SECONDS = 10.0
"""A worker that lived this long starts the pauses from the beginning."""
_FRUITLESS_STARTS = 2
"""After so many starts in a row that did not come to serving, the next worker leaves the cache alone."""
_STALE_PROBE_SECONDS = 2.0
_MESSAGE_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount and how to start the process that serves it.

    ``start`` is passed through to the worker unread. ``on_mounted``, where given, is called when the directory
    is mounted, which then happens at once: the worker prepares meanwhile, and whoever looks into the directory
    waits for it.
    """

    mountpoint: str
    source: str
    allow_other: bool
    worker_command: Sequence[str]
    start: dict[str, object]
    on_mounted: Callable[[], None] | None = None


class WorkerFailedError(Exception):
    """The worker gave up before the first mount; carries its one line and exit code."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def check_mountpoint(mountpoint: str) -> None:
    """Make sure something can be mounted here; a dead mount of ours is cleared away first.

    Raises:
        MountpointError: Missing, not a directory, not empty, or a live mount already.
        FuseUnavailableError: No usable /dev/fuse.
    """
    if not Path("/dev/fuse").exists():
        raise FuseUnavailableError(
            "/dev/fuse is missing", "load the fuse module, or give the container --device /dev/fuse"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise FuseUnavailableError("/dev/fuse may not be opened by this user", "run as root, or chmod 666 /dev/fuse")
    if mount_at(mountpoint):
        state = _probe(mountpoint)
        if state != errno.ENOTCONN:
            what = "is already a modelfs mount" if state == 0 else "is a modelfs mount that does not answer"
            raise MountpointError(f"{mountpoint} {what}", f"run: modelfs umount {mountpoint}")
        log.warning("clearing the dead mount at %s", mountpoint)
        unmount(mountpoint, lazy=True)
    try:
        entries = os.scandir(mountpoint)
    except FileNotFoundError:
        raise MountpointError(f"mountpoint {mountpoint} does not exist", f"run: mkdir -p {mountpoint}") from None
    except NotADirectoryError:
        raise MountpointError(f"mountpoint {mountpoint} is not a directory", "name an empty directory") from None
    except OSError as error:
        raise MountpointError(
            f"mountpoint {mountpoint} cannot be read ({error.strerror})", "check its permissions"
        ) from None
    with entries:
        if next(entries, None) is not None:
            raise MountpointError(
                f"mountpoint {mountpoint} is not empty", "name an empty directory; a mount would hide its files"
            )


def _probe(path: str) -> int:
    """Return 0 if the mount at ``path`` answers, its errno if not, ``ETIMEDOUT`` after two seconds; never hangs."""
    outcome = [errno.ETIMEDOUT]

    def ask() -> None:
        try:
            os.statvfs(path)  # unlike stat, never answered from the kernel's cache
            outcome[0] = 0
        except OSError as error:
            outcome[0] = error.errno or errno.EIO

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_STALE_PROBE_SECONDS)
    return outcome[0]


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount; as root directly, else through fusermount3.

    Raises:
        MountpointError: Busy, or not permitted.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(mountpoint), 2 if lazy else 0) == 0:
            return
        reason = os.strerror(ctypes.get_errno())
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FuseUnavailableError(f"fusermount3 failed ({error})", "install the package fuse3") from error
        if done.returncode == 0:
            return
        reason = done.stderr.strip().rpartition(": ")[2]
    raise MountpointError(f"cannot unmount {mountpoint} ({reason})", "close the files in use, or add --lazy")


def _open_channel(request: MountRequest) -> int:
    """Mount through libfuse's ``fuse_open_channel``, as mount.fuse3 does; return the descriptor."""
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            libfuse = ctypes.CDLL(name, use_errno=True)
            break
        except OSError:
            continue
    else:
        raise FuseUnavailableError("libfuse3 is not installed", "install the package fuse3 (libfuse3-3)")
    source = request.source.replace(",", "_").replace("\\", "_")
    words = ["ro", "nosuid", "nodev", "noatime", "default_permissions", f"fsname={source}", "subtype=modelfs"]
    if request.allow_other:
        words.append("allow_other")
    descriptor = int(libfuse.fuse_open_channel(os.fsencode(request.mountpoint), ",".join(words).encode()))
    if descriptor < 0:
        mend = "see the line above"
        if os.geteuid() != 0 and request.allow_other:
            mend = "put user_allow_other into /etc/fuse.conf, or drop --allow-other"
        raise FuseUnavailableError(f"cannot mount at {request.mountpoint}", mend)
    os.set_inheritable(descriptor, False)
    return descriptor


class Supervisor:
    """One mount and the worker behind it.

    Args:
        request: What to mount.
        on_ready: Called once when the mount first answers.
    """

    def __init__(self, request: MountRequest, on_ready: Callable[[Tuning], None]) -> None:
        self._request = request
        self._on_ready = on_ready
        self._descriptor = -1
        self._opens = create_table()
        self._agreed = protocol.Negotiated(0, passthrough=False, resend=False)
        self._tuning = Tuning()
        self._worker: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._starts = 0
        self._fruitless = 0
        self._announced = False
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> int:
        """Serve until unmounted or told to stop; return the exit code.

        Raises:
            WorkerFailedError: The worker could not start serving at all.
            FuseUnavailableError: The mount was refused.
        """
        self._take_signals()
        _set_oom_score(-900)
        quick_ends = 0
        try:
            while True:
                began = time.monotonic()
                outcome = self._run_worker()
                if outcome == "unmounted" or self._stopping:
                    return 0
                if not self._announced:
                    raise WorkerFailedError(f"the worker ended before the mount answered ({outcome}), see above", 1)
                quick_ends = 0 if time.monotonic() - began > _STABLE_SECONDS else quick_ends + 1
                pause = _RESTART_PAUSES[min(quick_ends, len(_RESTART_PAUSES) - 1)]
                log.error("worker ended (%s), starting it again in %.1f s; the mount stays", outcome, pause)
                self._sleep(pause)
                if not self._agreed.resend:
                    self._remount()
        finally:
            self._stop()

    # -- the worker ---------------------------------------------------------------------------------

    def _run_worker(self) -> str:
        """Start one worker and watch it to its end; return why it ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
        with ours:
            with theirs:
                self._worker = subprocess.Popen(
                    [*self._request.worker_command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            self._channel = ours
            self._starts += 1
            without = self._announced and self._fruitless >= _FRUITLESS_STARTS
            start = {
                **self._request.start,
                "starts": self._starts,
                "mounted": self._announced,
                "without_cache": without,
            }
            self._fruitless += 1
            try:
                _send(ours, {"start": start})
                if self._request.on_mounted is not None and self._descriptor < 0:
                    self._mount()
                    self._request.on_mounted()
                return self._watch(ours, self._worker)
            finally:
                self._channel = None
                self._end_worker()

    def _watch(self, channel: socket.socket, worker: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + PREPARE_SECONDS
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([channel.fileno(), self._wake_read], [], [], left)
            if self._stopping:
                return "stopped"
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)  # a signal that asks for nothing, as of a child's end
            if not ready:
                self._dump_stacks(worker)
                return f"no sign of life for {HANG_SECONDS:.0f} s"
            message = _receive(channel) if channel.fileno() in ready else b"{}"
            if not message:
                code = worker.wait()
                if code == -signal.SIGBUS:
                    self._fruitless = _FRUITLESS_STARTS  # the index is a mapped file, and its disk cannot be read
                return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            for kind, value in json.loads(message).items():
                if kind in {"serving", "beat"}:
                    deadline = time.monotonic() + HANG_SECONDS
                outcome = self._take(channel, kind, value)
                if outcome:
                    return outcome

    def _take(self, channel: socket.socket, kind: str, value: Any) -> str:  # noqa: ANN401
        """Act on one message; return why the worker is to end, or an empty string."""
        if kind == "failed":
            if not self._announced:
                raise WorkerFailedError(value["line"], value["exit_code"])
            return str(value["line"])
        if kind == "unmounted":
            return kind
        if kind == "prepared":
            self._connect(channel)
        if kind == "serving":
            self._fruitless = 0
            self._announce()
        return ""

    def _connect(self, channel: socket.socket) -> None:
        if self._descriptor < 0:
            self._mount()
        connect = {
            "passthrough": self._agreed.passthrough,
            "resend": self._agreed.resend,
            "tuning": dataclasses.asdict(self._tuning),
        }
        _send(channel, {"connect": connect}, [self._descriptor, self._opens])

    def _announce(self) -> None:
        if self._announced:
            return
        if _probe(self._request.mountpoint):
            raise WorkerFailedError(f"the mount at {self._request.mountpoint} does not answer", 7)
        self._announced = True
        self._on_ready(self._tuning)

    def _dump_stacks(self, worker: subprocess.Popen[bytes]) -> None:
        worker.send_signal(signal.SIGABRT)  # faulthandler prints every thread's stack
        with contextlib.suppress(subprocess.TimeoutExpired):  # SIGKILL follows
            worker.wait(2)

    def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if worker.poll() is None:
            worker.terminate()
            try:
                worker.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # Not even SIGKILL ends a thread that waits for a broken disk; the next worker does not wait for it.
                    worker.wait(STOP_SECONDS)

    # -- the mount ----------------------------------------------------------------------------------

    def _mount(self) -> None:
        self._descriptor = _open_channel(self._request)
        os.set_blocking(self._descriptor, True)
        try:
            reply, self._agreed = protocol.init_reply(os.read(self._descriptor, protocol.REQUEST_BUFFER_BYTES))
            os.write(self._descriptor, reply)
        except (OSError, ValueError) as error:
            raise FuseUnavailableError(
                f"the kernel refused the FUSE handshake ({error})", "report this with your kernel version"
            ) from error
        os.set_blocking(self._descriptor, False)
        mount = mount_at(self._request.mountpoint)
        if mount is not None:
            self._tuning = tune(mount, passthrough=self._agreed.passthrough, resend=self._agreed.resend)
        for hint in self._tuning.hints():
            log.warning("%s", hint)

    def _remount(self) -> None:
        """Without resend, requests the dead worker had read are lost: end this connection, begin another."""
        log.error("this kernel cannot resend requests: mounting anew, files open now return errors")
        unmount(self._request.mountpoint, lazy=True)
        os.close(self._descriptor)
        os.close(self._opens)
        self._opens = create_table()
        self._mount()

    def _stop(self) -> None:
        """Unmount and end the worker; bounded, whatever hangs."""
        if self._descriptor < 0:
            return
        if mount_at(self._request.mountpoint):
            try:
                unmount(self._request.mountpoint)
            except (MountpointError, FuseUnavailableError) as error:
                # Before the mount has answered nobody can have done anything in it.
                log.log(logging.WARNING if self._announced else logging.DEBUG, "%s; detaching it", error)
                try:
                    unmount(self._request.mountpoint, lazy=True)
                except (MountpointError, FuseUnavailableError) as second:
                    log.error("%s", second)
        self._end_worker()
        os.close(self._descriptor)  # the last descriptor: the kernel ends what still waits
        self._descriptor = -1

    # -- the process --------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Make ``run`` unmount and return; for signal handlers."""
        self._stopping = True

    def _sleep(self, seconds: float) -> None:
        if seconds:
            select.select([self._wake_read], [], [], seconds)


def _send(channel: socket.socket, message: dict[str, object], descriptors: Sequence[int] = ()) -> None:
    """Send to the worker; one that died just now is noticed by ``_receive``."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(channel, [json.dumps(message).encode()], list(descriptors))


def _receive(channel: socket.socket) -> bytes:
    """Return the worker's next message, empty when it is gone."""
    try:
        return channel.recv(_MESSAGE_BYTES)
    except ConnectionResetError:
        return b""  # killed before it had read everything


def _set_oom_score(score: int) -> None:
    with contextlib.suppress(OSError):  # lowering needs CAP_SYS_RESOURCE; the mount works without
        Path("/proc/self/oom_score_adj").write_text(str(score))


def notify_systemd(state: str) -> None:
    """Tell systemd about ``state`` (sd_notify(3)), where it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            print(f"modelfs: cannot notify systemd: {error}", file=sys.stderr)
