"""``modelfs doctor``: one line for every thing that makes mounts fail or slow, each with its mend."""

import argparse
import mmap
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from modelfs import config as configuration
from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectInfo
from modelfs.cli.client import status_of
from modelfs.cli.progress import human_bytes
from modelfs.errors import ModelfsError
from modelfs.fuse.tuning import READ_AHEAD_KIB, Mount, has_cap_sys_admin, mounts
from modelfs.metrics import Metrics
from modelfs.origins.places import make_origin

OK, WARN, FAIL = "ok", "warn", "FAIL"
_PROBE_BYTES = 64 * 1024 * 1024
_SLOW_DISK_BYTES_PER_SECOND = 200e6
_NOT_KEPT = {
    "no_room": "raise --cache-size, lower --min-free, or free space on the cache's disk",
    "disk_full": "free space or inodes on the cache's disk ({error})",
    "disk_error": "check the cache's disk ({error}); reads go on, but from the bucket",
    "slow_disk": "put the cache on a local NVMe disk",
}
"""Reason of ``modelfs_store_skipped_chunks_total`` to its mend."""
Finding = tuple[str, str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="also check that this source can be read")
    for name in ("cache_dir", "endpoint_url", "region", "profile"):
        parser.add_argument("--" + name.replace("_", "-"), dest=name, metavar="VALUE", help="as for modelfs mount")
    parser.add_argument("--no-sign-request", dest="no_sign_request", action="store_const", const="true")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 0 unless one of them makes mounting impossible."""
    flags = {
        name: value
        for name in ("cache_dir", "endpoint_url", "region", "profile", "no_sign_request")
        if (value := getattr(arguments, name)) is not None
    }
    source = arguments.source or "s3://unused"
    config = configuration.build([source], "/unused", flags, os.environ)
    worst = OK
    for level, what, mend in _findings(config, with_source=arguments.source is not None):
        print(f"{level:4}  {what}" + (f": {mend}" if mend else ""))
        worst = FAIL if FAIL in {level, worst} else worst
    return 1 if worst == FAIL else 0


def _findings(config: configuration.Config, *, with_source: bool) -> Iterator[Finding]:
    yield _python()
    yield _device()
    yield _fusermount()
    yield _allow_other()
    yield _kernel()
    yield _read_ahead()
    yield _page_size()
    yield from _cache(Path(config.store.cache_dir), config.store)
    if with_source:
        yield from _bucket(config)
    for mount in mounts():
        yield from _mounted(mount)


def _python() -> Finding:
    return OK, f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores", ""


def _device() -> Finding:
    if not Path("/dev/fuse").exists():
        return FAIL, "/dev/fuse is missing", "modprobe fuse, or give the container --device /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return FAIL, "/dev/fuse may not be opened by this user", "run as root, or chmod 666 /dev/fuse"
    return OK, "/dev/fuse can be opened", ""


def _fusermount() -> Finding:
    path = shutil.which("fusermount3")
    if path:
        return OK, f"fusermount3 is {path}", ""
    if os.geteuid() == 0:
        return OK, "fusermount3 is missing, root mounts without it", ""
    return FAIL, "fusermount3 is missing", "install the package fuse3"


def _allow_other() -> Finding:
    if os.geteuid() == 0:
        return OK, "--allow-other is permitted (root)", ""
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        lines = []
    if any(line.strip() == "user_allow_other" for line in lines):
        return OK, "--allow-other is permitted (/etc/fuse.conf)", ""
    return (
        WARN,
        "--allow-other is not permitted, only this user will see the mount",
        "put user_allow_other into /etc/fuse.conf",
    )


def _kernel() -> Finding:
    numbers = platform.release().split("-")[0].split(".")
    version = tuple(int(number) for number in numbers[:2] if number.isdigit())
    if version < (6, 9):
        return (
            WARN,
            f"Linux {platform.release()} has no FUSE passthrough and no resend",
            "6.9 or newer serves complete files at disk speed",
        )
    if not has_cap_sys_admin():
        return (
            WARN,
            "no CAP_SYS_ADMIN, so no passthrough: complete files are served by copy",
            "run as root or add the capability",
        )
    return OK, "passthrough and resend are available", ""


def _read_ahead() -> Finding:
    knobs = next(iter(Path("/sys/class/bdi").glob("*/read_ahead_kb")), None)
    if knobs is not None and os.access(knobs, os.W_OK) and os.statvfs(knobs).f_flag & os.ST_RDONLY == 0:
        return OK, f"read_ahead_kb can be raised to {READ_AHEAD_KIB}", ""
    return (
        WARN,
        "read_ahead_kb cannot be raised, mmap reads of incomplete files will be slow",
        "run as root with a writable /sys",
    )


def _page_size() -> Finding:
    size = mmap.PAGESIZE
    if size == 4096:
        return OK, "page size is 4 KiB", ""
    return WARN, f"page size is {size // 1024} KiB", "supported, but tested with 4 KiB pages; report what you see"


def _cache(directory: Path, config: configuration.StoreConfig) -> Iterator[Finding]:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        room = os.statvfs(directory)
        total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
        usable = min(config.cache_size.of(total), free - config.min_free.of(total))
        if usable < CHUNK_BYTES:
            yield (
                FAIL,
                f"the cache in {directory} has no room",
                "free space, lower --min-free or choose another --cache-dir",
            )
            return
        yield OK, f"the cache in {directory} may grow to {human_bytes(usable)} ({human_bytes(free)} free)", ""
        if room.f_files and room.f_favail < 10000:
            yield WARN, f"{directory} has {room.f_favail} inodes left", "every object takes one"
        rate = _disk_rate(directory)
        if rate < _SLOW_DISK_BYTES_PER_SECOND:
            yield WARN, f"{directory} writes {human_bytes(rate)}/s", "put the cache on a local NVMe disk"
        else:
            yield OK, f"{directory} writes {human_bytes(rate)}/s", ""
    except OSError as error:
        yield (
            FAIL,
            f"the cache directory {directory} cannot be used ({error.strerror})",
            "choose a writable --cache-dir",
        )


def _disk_rate(directory: Path) -> float:
    """Return bytes per second of a durable sequential write."""
    path = directory / ".doctor"
    block = os.urandom(1024 * 1024)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        began = time.monotonic()
        for _ in range(_PROBE_BYTES // len(block)):
            os.write(descriptor, block)
        os.fdatasync(descriptor)
        return _PROBE_BYTES / (time.monotonic() - began)
    finally:
        os.close(descriptor)
        path.unlink()


def _mounted(mount: Mount) -> Iterator[Finding]:
    """Tell what a mount that is there suffers from."""
    try:
        cache = status_of(mount)["cache"]
    except ModelfsError as error:
        yield WARN, str(error), ""
        return
    for reason, count in cache["skipped_chunks"].items():
        if count:
            what = f"{mount.mountpoint}: {count} chunks were served but not kept ({reason})"
            yield WARN, what, _NOT_KEPT[reason].format(error=cache["disk_error"] or "it works again")


class _Discard:
    """A sink that counts."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(256 * 1024))

    def space(self) -> memoryview:
        return self._buffer

    def advance(self, count: int) -> None:
        pass

    def connected(self, abort: object) -> None:
        pass


def _bucket(config: configuration.Config) -> Iterator[Finding]:
    source = config.sources[0]
    try:
        began = time.monotonic()
        origin = make_origin(source.place, config.origin, Metrics().origin_counter(source.scheme))
        first: ObjectInfo | None = next(iter(origin.list(source.prefix)), None)
        if first is None:
            yield FAIL, f"there is no object under {source.uri}", "check the prefix"
            return
        yield OK, f"credentials can list {source.uri} ({time.monotonic() - began:.2f} s)", ""
        largest = max(origin.list(source.prefix), key=lambda info: info.size)
        if largest.size:
            span = ByteRange(0, min(largest.size, _PROBE_BYTES))
            began = time.monotonic()
            origin.read_into(largest, span, _Discard())
            rate = len(span) / (time.monotonic() - began)
            yield OK, f"one connection reads {human_bytes(rate)}/s from {origin.name}", ""
    except ModelfsError as error:
        yield FAIL, str(error), ""
