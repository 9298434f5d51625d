"""The kernel's FUSE structures that modelfs reads or writes itself, from ``linux/fuse.h``.

Only what the supervisor (INIT, RESEND) and the front (OPEN, READ, RELEASE, ...) need; everything else
passes unchanged to pyfuse3. All integers are little- or big-endian as the machine is. The comment
beside a constant names the protocol version that brought it.
"""

import os
import struct
from dataclasses import dataclass

# struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen + padding
IN_HEADER = struct.Struct("=IIQQIIII")
# struct fuse_out_header: len, error, unique
OUT_HEADER = struct.Struct("=IiQ")
# struct fuse_init_in: major, minor, max_readahead, flags, flags2 (7.36)
INIT_IN = struct.Struct("=IIIII")
# struct fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
# time_gran, max_pages, map_alignment, flags2, max_stack_depth (7.40), then unused
INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
# struct fuse_open_in: flags, open_flags
OPEN_IN = struct.Struct("=II")
# struct fuse_open_out: fh, open_flags, backing_id (7.40)
OPEN_OUT = struct.Struct("=QIi")
# struct fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding
READ_IN = struct.Struct("=QQIIQII")
# struct fuse_release_in: fh, flags, release_flags, lock_owner
RELEASE_IN = struct.Struct("=QIIQ")
# struct fuse_getxattr_in: size, padding; the NUL-ended name follows
GETXATTR_IN = struct.Struct("=II")
# struct fuse_backing_map (7.40): fd, flags, padding
BACKING_MAP = struct.Struct("=iIQ")

FORGET = 2
OPEN = 14
READ = 15
RELEASE = 18
GETXATTR = 22
FLUSH = 25
INIT = 26
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42
LSEEK = 46

OPCODE_NAMES = {
    FORGET: "forget",
    OPEN: "open",
    READ: "read",
    RELEASE: "release",
    GETXATTR: "getxattr",
    FLUSH: "flush",
    INIT: "init",
    INTERRUPT: "interrupt",
    DESTROY: "destroy",
    BATCH_FORGET: "batch_forget",
    LSEEK: "lseek",
}

# INIT flags; those of bit 32 and up travel in flags2.
ASYNC_READ = 1 << 0
DO_READDIRPLUS = 1 << 13  # 7.21
ASYNC_DIO = 1 << 15  # 7.22
PARALLEL_DIROPS = 1 << 18  # 7.25
MAX_PAGES = 1 << 22  # 7.28
EXPLICIT_INVAL_DATA = 1 << 25  # 7.30
INIT_EXT = 1 << 30  # 7.36
PASSTHROUGH = 1 << 37  # 7.40
HAS_RESEND = 1 << 39  # 7.40

WANTED = (
    ASYNC_READ
    | DO_READDIRPLUS
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
    | EXPLICIT_INVAL_DATA
    | INIT_EXT
    | PASSTHROUGH
    | HAS_RESEND
)

FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5  # 7.35
FOPEN_PASSTHROUGH = 1 << 7  # 7.40

NOTIFY_RESEND = 7  # 7.40
UNIQUE_RESEND = 1 << 63  # 7.40: set in ``unique`` of a request that is sent again

# _IOW(229, 1, struct fuse_backing_map) and _IOW(229, 2, uint32_t)
DEV_IOC_BACKING_OPEN = 0x4010E501
DEV_IOC_BACKING_CLOSE = 0x4004E502

MAX_BACKGROUND = 64
"""Requests the kernel keeps in flight for read-ahead and O_DIRECT; the default of 12 caps both."""
CONGESTION_THRESHOLD = 48
MAX_PAGES_COUNT = 256
"""Largest READ in pages: the kernel's default limit. 1 MiB with 4 KiB pages; larger ones gain nothing."""
MAX_WRITE_BYTES = 4096
"""The kernel's smallest; nothing is written, and it sets how large a request buffer must be."""
REQUEST_BUFFER_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What INIT agreed on."""

    minor: int
    passthrough: bool
    resend: bool


@dataclass(frozen=True, slots=True)
class Header:
    """The header every request begins with."""

    length: int
    opcode: int
    unique: int
    nodeid: int
    pid: int


def parse_header(data: bytes | memoryview) -> Header:
    """Read a request's header.

    Raises:
        ValueError: Fewer bytes than a header, or a length that does not match.
    """
    if len(data) < IN_HEADER.size:
        raise ValueError(f"request of {len(data)} bytes is shorter than its header")
    length, opcode, unique, nodeid, _uid, _gid, pid, _ext = IN_HEADER.unpack_from(data)
    if length != len(data):
        raise ValueError(f"request says {length} bytes but has {len(data)}")
    return Header(length, opcode, unique, nodeid, pid)


def init_reply(request: bytes) -> tuple[bytes, Negotiated]:
    """Answer the kernel's INIT; return the reply and what it agrees on.

    Raises:
        ValueError: The request is not an INIT of major version 7.
    """
    header = parse_header(request)
    body = request[IN_HEADER.size :].ljust(INIT_IN.size, b"\0")
    major, minor, max_readahead, low, high = INIT_IN.unpack_from(body)
    if header.opcode != INIT or major != 7:
        raise ValueError(f"expected INIT of FUSE 7, got opcode {header.opcode}, version {major}.{minor}")
    offered = low | (high << 32 if low & INIT_EXT else 0)
    flags = offered & WANTED
    agreed = Negotiated(minor, bool(flags & PASSTHROUGH), bool(flags & HAS_RESEND))
    reply = INIT_OUT.pack(
        7,
        min(minor, 41),
        max_readahead,
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        MAX_WRITE_BYTES,
        1,
        MAX_PAGES_COUNT,
        0,
        flags >> 32,
        1 if agreed.passthrough else 0,
    )
    return OUT_HEADER.pack(OUT_HEADER.size + len(reply), 0, header.unique) + reply, agreed


def synthetic_init() -> bytes:
    """Return an INIT (7.31, plain flags) for libfuse's end of the namespace pair."""
    body = INIT_IN.pack(7, 31, 128 * 1024, ASYNC_READ | DO_READDIRPLUS | PARALLEL_DIROPS, 0)
    return IN_HEADER.pack(IN_HEADER.size + len(body), INIT, 1, 0, 0, 0, os.getpid(), 0) + body


def error_reply(unique: int, code: int) -> bytes:
    """Return a reply that carries the positive errno ``code`` (0: success without a body)."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code, unique)


def resend_notification() -> bytes:
    """Return FUSE_NOTIFY_RESEND: the kernel queues unanswered requests again."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)
