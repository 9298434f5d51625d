"""Kernel knobs of a mount: what is set, what was read back, and how to say so.

INIT (``protocol``) sets max_background and asks for passthrough and resend; read-ahead can only be
raised through sysfs, by root. Nothing here touches the mount itself: device numbers come from
/proc/self/mountinfo, so a hung mount cannot hang this module.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

READ_AHEAD_KIB = 16 * 1024
"""Read-ahead in KiB. Rate = min(read-ahead, max_background MiB) / latency: the default of 128 halves local
throughput and ruins it with latency; 128 MiB was slower than 16 MiB on two cores."""

FILESYSTEM_TYPE = "fuse.modelfs"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo that is a modelfs mount."""

    mountpoint: str
    source: str
    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the kernel really uses for one mount; -1 where it could not be read."""

    read_ahead_kib: int = -1
    max_background: int = -1
    passthrough: bool = False
    resend: bool = False

    def hints(self) -> list[str]:
        """Return one sentence for everything that is less than it could be."""
        found = []
        if self.read_ahead_kib < READ_AHEAD_KIB:
            found.append(
                f"read_ahead_kb is {self.read_ahead_kib} and could not be raised to {READ_AHEAD_KIB}: "
                "run as root with a writable /sys"
            )
        if not self.passthrough:
            found.append("passthrough is off, complete files are served by copy: needs Linux 6.9 and CAP_SYS_ADMIN")
        if not self.resend:
            found.append("resend is off, a crash of the worker fails running reads: needs Linux 6.9")
        return found


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def mounts() -> list[Mount]:
    """Return every modelfs mount this process sees, oldest first."""
    found = []
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, (fstype, source, *_) = left.split(" "), right.split(" ")
        if fstype == FILESYSTEM_TYPE:
            major, _, minor = fields[2].partition(":")
            found.append(Mount(_unescape(fields[4]), _unescape(source), int(major), int(minor)))
    return found


def mount_at(mountpoint: str) -> Mount | None:
    """Return the topmost modelfs mount exactly at ``mountpoint``, or ``None``."""
    return next((mount for mount in reversed(mounts()) if mount.mountpoint == mountpoint), None)


def mount_of(path: str) -> Mount | None:
    """Return the modelfs mount that holds ``path`` (absolute, symlinks resolved by the caller), or ``None``."""
    holding = [mount for mount in mounts() if f"{path}/".startswith(mount.mountpoint.rstrip("/") + "/")]
    return max(holding, key=lambda mount: len(mount.mountpoint), default=None)


def _read_int(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


def tune(mount: Mount, *, passthrough: bool, resend: bool) -> Tuning:
    """Raise read-ahead where permitted; return what is in force now."""
    knob = Path(f"/sys/class/bdi/{mount.major}:{mount.minor}/read_ahead_kb")
    with contextlib.suppress(OSError):  # reported by the value read back
        knob.write_text(str(READ_AHEAD_KIB))
    background = _read_int(Path(f"/sys/fs/fuse/connections/{mount.minor}/max_background"))
    return Tuning(_read_int(knob), background, passthrough and has_cap_sys_admin(), resend)


def has_cap_sys_admin() -> bool:
    """Return whether this process holds CAP_SYS_ADMIN, which passthrough needs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & (1 << 21))
    return False


def control_socket(mountpoint: str) -> str:
    """Return the path of a mount's control socket, which daemon and commands both derive from the mountpoint."""
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".sock"
    if os.geteuid() == 0:
        return f"/run/modelfs/{name}"
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/tmp/modelfs-{os.geteuid()}'}/modelfs/{name}"
