"""Configuration: one frozen dataclass per component holds default, unit, flag and help of every option.

The command line, the environment (``MODELFS_<NAME>``) and TOML (``--config``) are three ways to write
the same table; the table is the fields of the dataclasses below. A flag beats the environment, the
environment beats the file, the file beats the default. Unknown keys are errors. This module knows no
argument parser: ``cli`` builds one from ``options()``.
"""

import dataclasses
import difflib
import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelfs.chunks import CHUNK_BYTES, MIB
from modelfs.errors import ConfigError, MountpointError
from modelfs.source import Source, name_sources, parse_patterns, parse_source, read_source

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes, or a share (0..1) of something only known later."""

    bytes: int = 0
    share: float = 0.0

    def of(self, total: int) -> int:
        """Return the size in bytes where the whole is ``total`` bytes."""
        return int(total * self.share) if self.share else self.bytes


def parse_size(text: str) -> Size:
    """Parse ``200GiB``, ``1.5TB``, ``4096`` or ``80%``; raise ``ValueError`` otherwise."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kmgt]?i?b?)\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError("expected a size such as 200GiB, 1500MB or 80%")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        if not 0 < number <= 100:
            raise ValueError("a percentage must be above 0 and at most 100")
        return Size(share=number / 100)
    letter = unit[:1] if unit[:1] in _BINARY_UNITS else ""
    return Size(bytes=int(number * (_BINARY_UNITS[letter] if "i" in unit and letter else _UNITS[letter])))


def parse_seconds(text: str) -> float:
    """Parse ``90``, ``90s``, ``5m``, ``1h`` or ``off`` (0) into seconds; raise ``ValueError`` otherwise."""
    if text.strip().lower() == "off":
        return 0.0
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError("expected a duration such as 30s, 5m, 1h or off")
    return float(match[1]) * _SECONDS[(match[2] or "").lower()]


def parse_deadline(text: str) -> float:
    """Parse a duration of at least a second; raise ``ValueError`` otherwise."""
    seconds = parse_seconds(text)
    if seconds < 1:
        raise ValueError("expected a duration of at least 1s")
    return seconds


def parse_flag(text: str) -> bool:
    """Parse yes/no, true/false, on/off, 1/0; raise ``ValueError`` otherwise."""
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off"}:
        return False
    raise ValueError("expected true or false")


def parse_octal(text: str) -> int:
    """Parse an octal umask; raise ``ValueError`` otherwise."""
    if not re.fullmatch(r"0*[0-7]{1,3}", text.strip()):
        raise ValueError("expected an octal number such as 022")
    return int(text, 8)


def parse_processes(text: str) -> int:
    """Parse a number of processes; raise ``ValueError`` unless it is from 0 to 16."""
    if not text.strip().isdecimal() or int(text) > 16:
        raise ValueError("expected a number from 0 to 16")
    return int(text)


def parse_http(text: str) -> str:
    """Check an http or https URL; raise ``ValueError`` otherwise."""
    if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", text):
        raise ValueError("expected a URL such as http://127.0.0.1:8000/metrics")
    return text


def parse_admin(text: str) -> str:
    """Check ``HOST:PORT`` or ``off``; raise ``ValueError`` otherwise."""
    if text == "off":
        return text
    host, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise ValueError("expected an IP address and a port such as 127.0.0.1:9797, or off") from None
    if not port.isdigit() or int(port) > 65535:
        raise ValueError("expected a port from 0 to 65535")
    return text


def _choice(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"expected one of {', '.join(values)}")
        return text

    return parse


def _one(default: Any, parse: Callable[[str], Any], text: str, metavar: str = "") -> Any:  # noqa: ANN401
    """Declare an option: its default (parsed form), parser, help and the word shown for its value."""
    return field(default=default, metadata={"parse": parse, "help": text, "metavar": metavar})


def default_cache_dir() -> str:
    """Return the cache directory used when none is named: system-wide for root, the user's otherwise."""
    if os.geteuid() == 0:
        return "/var/cache/modelfs"
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelfs")


@dataclass(frozen=True, slots=True)
class OriginConfig:
    """How the object store is reached. Credentials come from the AWS SDK's chain only."""

    endpoint_url: str = _one("", str, "S3 endpoint; AWS_ENDPOINT_URL is honoured as well", "URL")
    region: str = _one("", str, "region of the buckets", "NAME")
    profile: str = _one("", str, "profile of the AWS configuration files", "NAME")
    no_sign_request: bool = _one(False, parse_flag, "anonymous access to public buckets")
    pin_versions: bool = _one(False, parse_flag, "read by version id, in versioned buckets: what is overwritten stays")
    addressing: str = _one(
        "auto", _choice("auto", "path", "virtual"), "bucket in the path or in the host name", "auto|path|virtual"
    )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where fetched chunks are kept, and how many."""

    cache_dir: str = _one("", str, "directory of the local store (default: %s)" % "/var/cache/modelfs", "DIR")  # noqa: UP031
    cache_size: Size = _one(
        Size(share=0.8), parse_size, "largest size of the store, bytes or a share of the disk", "SIZE"
    )
    min_free: Size = _one(Size(share=0.05), parse_size, "space that always stays free on the store's disk", "SIZE")
    lower_dir: str = _one("", str, "store below, only read: a directory that modelfs get filled", "DIR")


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """What the directory shows."""

    include: tuple[str, ...] = _one((), parse_patterns, "show only keys that match (comma-separated globs)", "GLOBS")
    exclude: tuple[str, ...] = _one((), parse_patterns, "hide keys that match (comma-separated globs)", "GLOBS")
    layout: str = _one(
        "plain", _choice("plain", "hf"), "hf: show directories org/name as the Hub's cache would hold them", "plain|hf"
    )
    uid: int = _one(-1, int, "owner of every file (default: the mounting user)", "UID")
    gid: int = _one(-1, int, "group of every file (default: the mounting user's)", "GID")
    umask: int = _one(0o022, parse_octal, "permission bits taken from 0555", "OCTAL")
    immutable: bool = _one(False, parse_flag, "objects never change: list once, or not at all while the store is away")
    refresh: float = _one(300.0, parse_seconds, "list the bucket again this often; off: never", "SECONDS")


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """Limits of the downloads."""

    max_memory: Size = _one(Size(), parse_size, "bytes of download buffers (default: by free memory)", "SIZE")
    prefetch: str = _one(
        "auto", str, "what is downloaded ahead: off, auto, all, or names of models", "off|auto|all|NAMES"
    )
    processes: int = _one(
        -1, parse_processes, "processes that download (default: by the number of cores); 0: threads of the daemon", "N"
    )
    read_timeout: float = _one(60.0, parse_deadline, "a read that gains no byte for so long fails with EIO", "SECONDS")
    verify: str = _one(
        "background",
        _choice("off", "background", "strict"),
        "compare complete files with their publisher's digests; strict: refuse bad ones",
        "off|background|strict",
    )
    trace_uri: str = _one("", str, "bucket prefix through which nodes share the order of loads", "s3://BUCKET/PREFIX/")


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """The process and the mount itself."""

    admin: str = _one("127.0.0.1:9797", parse_admin, "address of /metrics and /v1/status, or off", "HOST:PORT|off")
    engine_metrics: str = _one("", parse_http, "the engine's metrics page: when its first token came", "URL")
    allow_other: bool = _one(False, parse_flag, "let other users read the mount")
    background: bool = _one(False, parse_flag, "return as soon as the mount answers")
    log_level: str = _one("info", _choice("debug", "info", "warning", "error"), "least severe message logged", "LEVEL")
    log_format: str = _one("text", _choice("text", "json"), "form of a log line", "text|json")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a mount needs to know."""

    sources: tuple[Source, ...]
    mountpoint: str
    origin: OriginConfig = OriginConfig()
    store: StoreConfig = StoreConfig()
    tree: TreeConfig = TreeConfig()
    fetch: FetchConfig = FetchConfig()
    daemon: DaemonConfig = DaemonConfig()

    def to_json(self) -> str:
        """Serialise for the worker process; holds no secret by construction."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Read what ``to_json`` wrote."""
        raw = json.loads(text)
        store, tree = raw["store"], raw["tree"]
        return cls(
            sources=tuple(
                Source(include=tuple(source.pop("include")), exclude=tuple(source.pop("exclude")), **source)
                for source in raw["sources"]
            ),
            mountpoint=raw["mountpoint"],
            origin=OriginConfig(**raw["origin"]),
            store=StoreConfig(
                cache_dir=store["cache_dir"],
                cache_size=Size(**store["cache_size"]),
                lower_dir=store["lower_dir"],
                min_free=Size(**store["min_free"]),
            ),
            tree=TreeConfig(tuple(tree.pop("include")), tuple(tree.pop("exclude")), **tree),
            fetch=FetchConfig(Size(**raw["fetch"].pop("max_memory")), **raw["fetch"]),
            daemon=DaemonConfig(**raw["daemon"]),
        )


_SECTIONS: dict[str, type] = {
    "origin": OriginConfig,
    "store": StoreConfig,
    "tree": TreeConfig,
    "fetch": FetchConfig,
    "daemon": DaemonConfig,
}


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table: a field of one component."""

    section: str
    name: str
    default: Any
    parse: Callable[[str], Any]
    help: str
    metavar: str

    @property
    def flag(self) -> str:
        """The command line form."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """The environment form."""
        return "MODELFS_" + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return isinstance(self.default, bool)


def options() -> list[Option]:
    """Return the table of all options, in the order of the components."""
    return [
        Option(
            section, item.name, item.default, item.metadata["parse"], item.metadata["help"], item.metadata["metavar"]
        )
        for section, kind in _SECTIONS.items()
        for item in dataclasses.fields(kind)
    ]


def check_mountpoint_text(mountpoint: str) -> str:
    """Return the absolute mountpoint.

    Raises:
        MountpointError: It holds whitespace, which engines read wrongly from /proc/mounts.
    """
    if re.search(r"[\s\\,]", mountpoint):
        raise MountpointError(
            f"mountpoint {mountpoint!r} has a space, comma or backslash",
            "choose a plain path; engines misread /proc/mounts",
        )
    return str(Path(mountpoint).absolute())


def _toml_line(text: str, key: str) -> int:
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return 1


def read_toml(path: str) -> dict[str, Any]:
    """Read a configuration file into ``{option name: parsed value}`` plus ``sources`` and ``mountpoint``.

    Raises:
        ConfigError: The file is missing, is not TOML, or has an unknown key or a bad value; names the line.
    """
    import tomllib  # noqa: PLC0415 - a start is imports, and most have no file

    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read configuration file {path} ({reason})", "check --config") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML ({error})", "mend that line") from error
    table = {option.name: option for option in options()}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        where = f"{path}, line {_toml_line(text, key)}"
        name = key.replace("-", "_")
        if name == "sources" and isinstance(value, list) and all(isinstance(item, str | dict) for item in value):
            values[name] = [parse_source(item) if isinstance(item, str) else read_source(item, path) for item in value]
        elif name == "mountpoint" and isinstance(value, str):
            values[name] = value
        elif name in table:
            values[name] = _toml_value(table[name], value, where)
        else:
            near = difflib.get_close_matches(name, [*table, "sources", "mountpoint"], 1)
            raise ConfigError(
                f"{where}: unknown or malformed key '{key}'", f"did you mean '{near[0]}'?" if near else "see README.md"
            )
    return values


def _toml_value(option: Option, value: object, where: str) -> Any:  # noqa: ANN401
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if isinstance(value, bool):
        value = "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ConfigError(f"{where}: {option.name} has the wrong type", option.help)
    return _parse(option, str(value), where)


def _parse(option: Option, text: str, where: str) -> Any:  # noqa: ANN401
    try:
        return option.parse(text)
    except ValueError as error:
        reason = str(error) if not str(error).startswith("invalid literal") else "expected a whole number"
        raise ConfigError(f"{where}: bad value '{text}'", reason) from error


def _check_fetch(fetch: FetchConfig) -> FetchConfig:
    if fetch.max_memory.bytes and fetch.max_memory.bytes < 4 * CHUNK_BYTES:
        raise ConfigError(
            f"--max-memory {fetch.max_memory.bytes} bytes holds fewer than four chunks",
            f"give at least {4 * CHUNK_BYTES // MIB}MiB",
        )
    if fetch.trace_uri and parse_source(fetch.trace_uri).scheme != "s3":
        raise ConfigError(f"--trace-uri '{fetch.trace_uri}' cannot be written to", "write s3://BUCKET/PREFIX/")
    return fetch


def build(
    sources: list[str],
    mountpoint: str | None,
    flags: Mapping[str, str],
    environment: Mapping[str, str],
    config_path: str | None = None,
) -> Config:
    """Merge command line, environment and file into one checked configuration.

    Args:
        sources: Sources as written on the command line; empty to take the file's.
        mountpoint: The mountpoint as written; ``None`` to take the file's.
        flags: Option name to its text, for the flags that were given.
        environment: Usually ``os.environ``.
        config_path: TOML file, or ``None``.

    Raises:
        ConfigError: Anything unknown, malformed or contradictory.
        MountpointError: The mountpoint's name cannot be used.
    """
    from_file = read_toml(config_path) if config_path else {}
    parsed = [parse_source(text) for text in sources] or from_file.get("sources", [])
    if not parsed:
        raise ConfigError("no source to mount", "name one: modelfs mount s3://BUCKET/PREFIX/ MOUNTPOINT")
    mountpoint = mountpoint or from_file.get("mountpoint")
    if not mountpoint:
        raise ConfigError("no mountpoint", "name an empty directory: modelfs mount SOURCE MOUNTPOINT")
    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for option in options():
        if option.name in flags:
            values[option.section][option.name] = _parse(option, flags[option.name], option.flag)
        elif environment.get(option.env):
            values[option.section][option.name] = _parse(
                option, environment[option.env], f"environment variable {option.env}"
            )
        elif option.name in from_file:
            values[option.section][option.name] = from_file[option.name]
    store = StoreConfig(**values["store"])
    store = dataclasses.replace(store, cache_dir=str(Path(store.cache_dir or default_cache_dir()).absolute()))
    if store.cache_size.bytes and store.cache_size.bytes < CHUNK_BYTES:
        raise ConfigError(
            f"--cache-size {store.cache_size.bytes} bytes is smaller than one chunk",
            f"give at least {CHUNK_BYTES // MIB}MiB",
        )
    fetch = _check_fetch(FetchConfig(**values["fetch"]))
    origin = OriginConfig(**values["origin"])
    if origin.endpoint_url and not re.match(r"https?://[^/]+", origin.endpoint_url):
        raise ConfigError(
            f"--endpoint-url '{origin.endpoint_url}' is not an http(s) URL", "write http://HOST:PORT or https://HOST"
        )
    return Config(
        sources=name_sources(parsed, full=values["tree"].get("layout") == "hf"),
        mountpoint=check_mountpoint_text(mountpoint),
        origin=origin,
        store=store,
        tree=TreeConfig(**values["tree"]),
        fetch=fetch,
        daemon=DaemonConfig(**values["daemon"]),
    )
