"""``modelfs umount``."""

import argparse
import os
import select

from modelfs.cli.client import status_of
from modelfs.errors import ModelfsError, MountpointError
from modelfs.fuse.supervisor import unmount
from modelfs.fuse.tuning import Mount, mount_at

_LEAVE_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--lazy", action="store_true", help="detach now, finish when the last file is closed")


def run(arguments: argparse.Namespace) -> int:
    """Unmount and wait until the daemon is gone.

    Raises:
        MountpointError: Not a modelfs mount, or busy.
        ModelfsError: The daemon stays.
    """
    mountpoint = os.path.abspath(arguments.mountpoint)
    mount = mount_at(mountpoint) or mount_at(os.path.realpath(mountpoint))
    if mount is None:
        raise MountpointError(f"{mountpoint} is not a modelfs mount", "see: modelfs status")
    daemon = _daemon(mount)
    unmount(mount.mountpoint, lazy=arguments.lazy)
    if daemon >= 0 and not arguments.lazy:
        gone, _, _ = select.select([daemon], [], [], _LEAVE_SECONDS)
        if not gone:
            raise ModelfsError(f"{mount.mountpoint} is unmounted, but its daemon is still there", "see its log")
    return 0


def _daemon(mount: Mount) -> int:
    """Return a descriptor that turns readable when the mount's daemon has ended, -1 if it cannot be had."""
    try:
        return os.pidfd_open(status_of(mount)["pid"])
    except (ModelfsError, OSError):
        return -1
