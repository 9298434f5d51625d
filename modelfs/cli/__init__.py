"""The ``modelfs`` program: finds the command, prints one line for every error.

Each command is a module of this package with ``add_arguments(parser)`` and ``run(arguments) -> int``; it
is imported only when asked for, so that a supervisor carries no SDK.
"""

import argparse
import importlib
import keyword
import os
import sys
from collections.abc import Callable

from modelfs import __version__
from modelfs.errors import ModelfsError

COMMANDS = {
    "mount": "mount bucket prefixes as a read-only directory",
    "run": "mount, run a command beside it at once, and unmount when the command ends",
    "umount": "unmount",
    "status": "show what is mounted and how much of it is local",
    "wait": "wait until a path is mounted, has its heads, or is complete",
    "warm": "download paths now",
    "get": "bring files into a plain directory, without a mount",
    "push": "bring a model into a bucket",
    "ls": "show what a source holds, without a mount",
    "import": "read another tool's configuration as one of ours",
    "evict": "remove local copies; with --remote the objects too",
    "verify": "compare local files with the digests of their publisher",
    "why": "say where the time of the last load went, and what to change",
    "doctor": "check this machine and say what to do",
    "demo": "mount a model from an object store started for the purpose, and time it",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code (see README.md for the classes)."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="modelfs", description="Model weights from object storage as a directory.")
    parser.add_argument("--version", action="version", version=f"modelfs {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if name == chosen:
            module = importlib.import_module(f"modelfs.cli.{name}{'_' * keyword.iskeyword(name)}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    trailing: list[str] = []
    if chosen == "run" and "--" in words:
        cut = words.index("--")
        words, trailing = words[:cut], words[cut + 1 :]
    arguments = parser.parse_args(words, argparse.Namespace(trailing=trailing))
    return guarded(lambda: int(arguments.run(arguments)))


def guarded(call: Callable[[], int]) -> int:
    """Run ``call``; print a domain error as one line and return its exit code."""
    try:
        return call()
    except ModelfsError as error:
        print(f"modelfs: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def mount_helper(argv: list[str] | None = None) -> int:
    """``mount.modelfs SOURCE DIR [-o OPTIONS]``: what mount(8), fstab and systemd call."""
    words = sys.argv[1:] if argv is None else argv
    module = importlib.import_module("modelfs.cli.mount")
    return guarded(lambda: module.run_helper(words))
