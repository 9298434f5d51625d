"""A small disk of its own, on a loop device; for root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelfs.chunks import MIB

_THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")


def _do(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{words}: {done.stderr}")
    return done.stdout.strip()


@dataclass
class Disk:
    """A mounted ext4 file system of its own."""

    path: Path
    image: Path
    device: str

    @property
    def free_bytes(self) -> int:
        room = os.statvfs(self.path)
        return room.f_bavail * room.f_frsize

    def fill(self, leave: int = 0) -> None:
        """As another process would: leave so many bytes free."""
        with (self.path / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while (count := self.free_bytes - leave) > 0:
                file.write(bytes(min(count, MIB)))

    def fill_inodes(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(1 << 20):
                (self.path / f"i{number}").touch()

    def abort(self) -> None:
        """Make the file system read-only as an error of its own would."""
        _do("mount", "-o", "remount,abort", self.path)

    @contextlib.contextmanager
    def slow(self, bytes_per_second: int) -> Iterator[None]:
        """Writes to the device pass at no more than this rate."""
        name = Path(f"/sys/block/{Path(self.device).name}/dev").read_text().strip()
        _THROTTLE.write_text(f"{name} {bytes_per_second}")
        try:
            yield
        finally:
            _THROTTLE.write_text(f"{name} 0")


@contextlib.contextmanager
def disk(root: Path, mib: int, *, inodes: int = 1024, images: Path | None = None) -> Iterator[Disk]:
    """Make a disk.

    Args:
        root: Where it is mounted.
        mib: Its size.
        inodes: How many files it can hold.
        images: Where its bytes lie, in a sparse file.
    """
    path, image = root / "disk", (images or root) / "disk.img"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(mib * MIB)
    _do("mkfs.ext4", "-q", "-F", "-m", 0, "-N", inodes, "-E", "lazy_itable_init=0,nodiscard", image)
    device = _do("losetup", "--find", "--show", "--direct-io=on", image)
    try:
        _do("mount", device, path)
        try:
            yield Disk(path, image, device)
        finally:
            _do("umount", path)
    finally:
        _do("losetup", "--detach", device)


@contextlib.contextmanager
def memory_disk(path: Path, mib: int) -> Iterator[Path]:
    """A file system in memory that holds so much and no more."""
    path.mkdir()
    _do("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", path)
    try:
        yield path
    finally:
        _do("umount", path)
