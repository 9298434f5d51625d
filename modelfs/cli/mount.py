"""``modelfs mount`` and ``mount.modelfs``."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from modelfs import config as configuration
from modelfs.cli import options
from modelfs.errors import CacheError, ConfigError, ModelfsError
from modelfs.fuse.supervisor import (
    MountRequest,
    Supervisor,
    WorkerFailedError,
    check_mountpoint,
    notify_systemd,
)
from modelfs.fuse.tuning import Tuning
from modelfs.logs import setup_logging
from modelfs.threads import BACKGROUND_NICENESS

_BEGAN = time.monotonic()
"""When this program was started, nearly; what loads are timed from."""

# Options of mount(8), fstab and systemd that say nothing to us.
_HELPER_IGNORED = {
    "ro",
    "rw",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "defaults",
    "user",
    "users",
    "noatime",
    "nosuid",
    "nodev",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments from the table of options."""
    parser.usage = "modelfs mount [NAME=]SOURCE... MOUNTPOINT [options]"
    parser.add_argument(
        "words", nargs="*", metavar="[NAME=]SOURCE... MOUNTPOINT", help="s3://BUCKET/PREFIX/ and an empty directory"
    )
    options.add_options(parser)


def merge(arguments: argparse.Namespace) -> configuration.Config:
    """Return the configuration of a mount.

    Raises:
        ConfigError: See ``configuration.build``.
    """
    words = list(arguments.words)
    mountpoint = words.pop() if words and "://" not in words[-1] else None
    return options.merge(arguments, words, mountpoint)


def run(arguments: argparse.Namespace) -> int:
    """Mount and serve; return when unmounted, or with --background when the mount answers."""
    config = merge(arguments)
    check_mountpoint(config.mountpoint)
    if config.daemon.background:
        return _in_background(config)
    try:
        return _serve(config, announce)
    except WorkerFailedError as error:
        print(f"modelfs: {error}", file=sys.stderr)
        return error.exit_code


def announce(_tuning: Tuning) -> None:
    """Tell systemd that the mount answers."""
    notify_systemd(f"READY=1\nSTATUS=serving\nMAINPID={os.getpid()}")


def _serve(config: configuration.Config, on_ready: Callable[[Tuning], None]) -> int:
    """Be the supervisor.

    Raises:
        WorkerFailedError: The worker could not start serving.
        ModelfsError: The mount was refused.
    """
    setup_logging(config.daemon.log_level, config.daemon.log_format)
    return Supervisor(request(config), on_ready).run()


def request(config: configuration.Config, on_mounted: Callable[[], None] | None = None) -> MountRequest:
    """Return what the supervisor needs to know."""
    return MountRequest(
        mountpoint=config.mountpoint,
        source=config.sources[0].uri if len(config.sources) == 1 else "modelfs",
        allow_other=config.daemon.allow_other,
        worker_command=[sys.executable, "-m", "modelfs.worker"],
        start={"config": config.to_json(), "supervisor_pid": os.getpid(), "began": _BEGAN},
        on_mounted=on_mounted,
    )


def _in_background(config: configuration.Config) -> int:
    """Fork; the parent leaves when the child's mount answers, or prints why it does not."""
    log_path = Path(config.store.cache_dir) / "modelfs.log"
    try:
        log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheError(
            f"cache directory {config.store.cache_dir} cannot be used ({error.strerror})",
            "choose a writable --cache-dir",
        ) from error
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        return _await_child(read_end)
    os.close(read_end)
    os.setsid()
    with contextlib.suppress(OSError):
        # Where sessions are scheduled as groups (sched(7)), the niceness of our threads counts only among themselves.
        Path("/proc/self/autogroup").write_text(str(BACKGROUND_NICENESS))
    for target in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR) if target == 0 else log_file, target)

    code = 1
    try:
        code = _serve_in_child(config, write_end)
    finally:
        os._exit(code)


def _serve_in_child(config: configuration.Config, write_end: int) -> int:
    """Serve, and tell the waiting parent how the start went."""

    def ready(tuning: Tuning) -> None:
        os.write(write_end, json.dumps(["", 0]).encode())
        os.close(write_end)
        announce(tuning)

    try:
        return _serve(config, ready)
    except (WorkerFailedError, ModelfsError) as error:
        os.write(write_end, json.dumps([str(error), error.exit_code]).encode())
        return error.exit_code


def _await_child(read_end: int) -> int:
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read(65536)
    if not data:
        print(
            "modelfs: the daemon ended before the mount answered; see modelfs.log in the cache directory",
            file=sys.stderr,
        )
        return 1
    line, code = json.loads(data)
    if line:
        print(f"modelfs: {line}", file=sys.stderr)
    return int(code)


def run_helper(words: list[str]) -> int:
    """Mount in the background from ``SOURCE DIR [-sfnvN] [-o a,b=c]``; return when the mount answers.

    Raises:
        ConfigError: An option that is not in the table.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    positional: list[str] = []
    given: list[str] = []
    iterator = iter(words)
    for word in iterator:
        if word == "-o":
            given.extend(next(iterator, "").split(","))
        elif not word.startswith("-"):
            positional.append(word)
    if len(positional) != 2:
        raise ConfigError("mount.modelfs needs a source and a directory", "call: mount.modelfs SOURCE DIR [-o OPTIONS]")
    table = {option.name: option for option in configuration.options()}
    flags: dict[str, str] = {"background": "true"}
    config_path = None
    for item in filter(None, given):
        key, _, value = item.partition("=")
        name = key.replace("-", "_")
        if name == "config":
            config_path = value
        elif name in table:
            flags[name] = value or "true"
        elif name not in _HELPER_IGNORED and not key.startswith(("x-", "comment")):
            raise ConfigError(f"unknown mount option '{key}'", "use the names of modelfs mount, without the dashes")
    config = configuration.build(positional[0].split("|"), positional[1], flags, os.environ, config_path)
    check_mountpoint(config.mountpoint)
    return _in_background(config)
