"""Which origin serves a place: ``scheme://bucket``, as ``config.Source.place`` writes it.

The module of a kind is imported with its first use: each is an optional extra, and the SDKs are most of a start.
"""

import importlib

from modelfs.config import OriginConfig
from modelfs.errors import ConfigError
from modelfs.origins import Count, Origin
from modelfs.source import parse_source

_KINDS = {
    "s3": ("s3", "S3Origin", ""),
    "az": ("az", "AzOrigin", "az"),
    "gs": ("gs", "GsOrigin", "gs"),
    "hf": ("hf", "HubOrigin", "hf"),
    "file": ("file", "FileOrigin", ""),
    "https": ("web", "WebOrigin", ""),
    "http": ("web", "WebOrigin", ""),
}
"""Scheme to module, class, and the extra of this package that brings what it imports."""


def make_origin(place: str, config: OriginConfig, count: Count) -> Origin:
    """Return the origin of a place.

    Raises:
        ConfigError: It cannot be used as configured, or its extra is not installed.
    """
    source = parse_source(place)
    module, name, extra = _KINDS[source.scheme]
    try:
        kind = getattr(importlib.import_module(f"modelfs.origins.{module}"), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{source.scheme}:// needs the Python package {str(error.name).partition('.')[0]}",
            f"pip install 'modelfs[{extra}]'",
        ) from error
    made: Origin = kind(source=source, config=config, count=count)
    return made
