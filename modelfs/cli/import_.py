"""``modelfs import``: another tool's configuration as one of ours, on standard output."""

import argparse

from modelfs.imports import read_foreign, to_toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", metavar="FILE", help="a Truss config.yaml, or a model.json with download_files_from")


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration; return 0.

    Raises:
        ConfigError: The file cannot be read, or names no model.
    """
    print(to_toml(read_foreign(arguments.file)), end="")
    return 0
