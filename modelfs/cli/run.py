"""``modelfs run``: an engine and its model directory as one command.

The directory is mounted first, which takes a tenth of a second, and the command starts at once: while it
imports its libraries the daemon starts, lists the bucket and begins to download. Whoever looks into the
directory before the listing is there waits for it. The command's end unmounts; its exit status is ours.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys

from modelfs.cli import mount
from modelfs.errors import ConfigError
from modelfs.fuse.supervisor import Supervisor, WorkerFailedError, check_mountpoint
from modelfs.logs import setup_logging

COMMAND_STOP_SECONDS = 10.0
"""Time the command gets to end when the mount failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: those of ``mount``."""
    mount.add_arguments(parser)
    parser.usage = "modelfs run [NAME=]SOURCE... MOUNTPOINT [options] -- COMMAND [ARGUMENT...]"


def run(arguments: argparse.Namespace) -> int:
    """Mount, run the command, unmount; return the command's exit code, or 128 and its signal.

    Raises:
        ConfigError: No command, or one that cannot be found.
        ModelfsError: The mount was refused.
    """
    command: list[str] = arguments.trailing
    if not command:
        raise ConfigError("no command to run", "write it after --: modelfs run SOURCE MOUNTPOINT -- COMMAND")
    if shutil.which(command[0]) is None:
        raise ConfigError(f"command '{command[0]}' cannot be found", "check its name and PATH")
    config = mount.merge(arguments)
    if config.daemon.background:
        raise ConfigError("run stays in the foreground, with its command", "leave --background out")
    check_mountpoint(config.mountpoint)
    setup_logging(config.daemon.log_level, config.daemon.log_format)
    beside = _Beside(command)
    supervisor = Supervisor(mount.request(config, on_mounted=beside.start), mount.announce)
    beside.supervisor = supervisor
    try:
        supervisor.run()
    except WorkerFailedError as error:
        print(f"modelfs: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        beside.stop()
    return beside.exit_code


class _Beside:
    """The command. Signals for us are passed on to it; its end ends the mount."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self.supervisor: Supervisor | None = None

    def start(self) -> None:
        """Start the command; called when the directory is mounted."""
        self._process = subprocess.Popen(self._command)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGCHLD, self._look)
        self._look(signal.SIGCHLD, None)  # it may have ended before anyone listened

    def _pass_on(self, number: int, _frame: object) -> None:
        # A terminal sends ctrl-c to the whole group, the command included.
        if self._process is not None and not (number == signal.SIGINT and os.isatty(0)):
            self._process.send_signal(number)

    def _look(self, _number: int, _frame: object) -> None:
        assert self.supervisor is not None
        if self._process is not None and self._process.poll() is not None:
            self.supervisor.stop()

    def stop(self) -> None:
        """End the command if it still runs: its model is gone."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(COMMAND_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def exit_code(self) -> int:
        """The command's, as a shell gives it."""
        code = self._process.returncode if self._process is not None else 1
        return code if code >= 0 else 128 - code
