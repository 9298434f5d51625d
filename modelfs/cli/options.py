"""The table of options as flags of a command."""

import argparse
import os
from collections.abc import Container

from modelfs import config as configuration


def add_options(parser: argparse.ArgumentParser, names: Container[str] | None = None) -> None:
    """Declare ``--config`` and the options of these names, or all."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same options")
    for option in configuration.options():
        if names is not None and option.name not in names:
            continue
        if option.is_switch:
            parser.add_argument(option.flag, dest=option.name, action="store_const", const="true", help=option.help)
        else:
            parser.add_argument(
                option.flag, dest=option.name, metavar=option.metavar, help=option.help.replace("%", "%%")
            )
        if option.name == "addressing":
            for word, value in (("path-style", "path"), ("virtual-host", "virtual")):
                parser.add_argument(
                    f"--{word}",
                    dest=option.name,
                    action="store_const",
                    const=value,
                    help=f"short for --addressing {value}",
                )


def merge(arguments: argparse.Namespace, sources: list[str], mountpoint: str | None) -> configuration.Config:
    """Return the configuration that command line, environment and file give.

    Raises:
        ConfigError: See ``configuration.build``.
    """
    flags = {
        option.name: getattr(arguments, option.name)
        for option in configuration.options()
        if getattr(arguments, option.name, None) is not None
    }
    return configuration.build(sources, mountpoint, flags, os.environ, arguments.config)
