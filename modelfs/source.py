"""What a source is and how it is written: as a URI, or as a table in the configuration file.

Pure: nothing here knows an object store.
"""

import dataclasses
import difflib
import posixpath
import re
from dataclasses import dataclass
from typing import Any

from modelfs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """One mounted prefix.

    ``bucket`` is what the scheme calls one: a bucket or container, ``org/name`` of the Hub, a host, nothing for files.
    ``revision`` is the Hub's branch, tag or commit. ``name`` is the source's directory, empty when it is the root of
    the mount. ``origin`` is the second place: the URI of a source with the same files, or empty.
    """

    bucket: str
    prefix: str
    name: str = ""
    scheme: str = "s3"
    revision: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    origin: str = ""

    @property
    def place(self) -> str:
        """Where the objects lie, without the prefix; see ``origins.places``."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{self.bucket}{revision}"

    @property
    def uri(self) -> str:
        """The source as the user writes it."""
        return f"{self.place}/{self.prefix}"


def parse_patterns(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of patterns."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


_SCHEMES = {
    "s3": r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}",
    "gs": r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}",
    "az": r"[A-Za-z0-9$][A-Za-z0-9-]{1,62}",
    "hf": r"(?:(?:models|datasets|spaces)/)?[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}",
    "file": "",
    "https": r"[A-Za-z0-9.\[\]:_-]+",
    "http": r"[A-Za-z0-9.\[\]:_-]+",
}
"""What stands between the scheme and the prefix."""
_FORMS = {
    "hf": "hf://ORG/NAME[@REVISION][/PREFIX/]",
    "file": "file:///DIRECTORY/",
    "https": "https://HOST/PATH/",
    "http": "http://HOST/PATH/",
}
_REVISION = r"@(refs/pr/[0-9]+|[^/@\s]+)"


def parse_source(text: str) -> Source:
    """Parse ``[NAME=]s3://bucket/prefix/``, or one of the other schemes.

    Raises:
        ConfigError: The text is not a source.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"source {text!r} is no text", "write it in UTF-8") from None
    match = re.fullmatch(r"(?:([^=:]+)=)?([a-z0-9+]+)://(.*)", text, re.DOTALL)
    text = re.sub(r"(://)[^/@]*:[^/@]*@", r"\1...@", text).partition("?")[0]  # what may be a secret
    if not match:
        raise ConfigError(f"'{text}' is not a source", "write s3://BUCKET/PREFIX/ or NAME=s3://BUCKET/PREFIX/")
    name, scheme, rest = match[1] or "", match[2], match[3]
    if scheme not in _SCHEMES:
        known = ", ".join(f"{one}://" for one in _SCHEMES)
        raise ConfigError(f"'{text}' has the unknown scheme {scheme}://", f"one of {known} is supported")
    revision = _REVISION if scheme == "hf" else "()"
    parts = re.fullmatch(rf"({_SCHEMES[scheme]})(?:{revision})?(?:/(.*))?", rest, re.DOTALL)
    if not parts:
        form = _FORMS.get(scheme, f"{scheme}://BUCKET/PREFIX/")
        raise ConfigError(f"'{text}' has no valid {'repository' if scheme == 'hf' else 'bucket'} name", f"write {form}")
    bucket, prefix = parts[1], parts[3] or ""
    if scheme in {"http", "https"} and re.search("[?#]", rest):
        raise ConfigError(f"'{text}' has a query", "name a directory that can be read without one")
    if scheme == "file":
        prefix = posixpath.normpath(f"/{prefix}").lstrip("/")
    if not _usable(name) or "\0" in prefix:
        raise ConfigError(f"'{name}' cannot be the name of a directory", "choose another NAME=")
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    return Source(bucket, prefix, name, scheme, parts[2] or "")


def _usable(name: str) -> bool:
    """Return whether a source's name can be a directory, or several below each other."""
    return not name or not any(
        part in {"", ".", ".."} or "\0" in part or len(part.encode()) > 255 for part in name.split("/")
    )


def name_sources(sources: list[Source], *, full: bool = False) -> tuple[Source, ...]:
    """Give every source of several a directory name of its own: the one written, else its last path part.

    Args:
        sources: As they were written.
        full: Repositories of the Hub are called ``org/name``, also a single one.

    Raises:
        ConfigError: Two sources would share a name.
    """
    if len(sources) == 1 and not (full and sources[0].scheme == "hf"):
        return tuple(sources)
    named = [
        source if source.name else dataclasses.replace(source, name=_default_name(source, full=full))
        for source in sources
    ]
    for index, source in enumerate(named):
        if not _usable(source.name):
            raise ConfigError(f"{source.uri} cannot be the directory '{source.name}'", f"name it: NAME={source.uri}")
        for other in named[:index]:
            if other.name == source.name:
                raise ConfigError(
                    f"{other.uri} and {source.uri} would both be the directory '{source.name}'",
                    f"name one of them: NAME={source.uri}",
                )
    return tuple(named)


def _default_name(source: Source, *, full: bool) -> str:
    if source.scheme == "hf" and full:
        return "/".join(source.bucket.split("/")[-2:])
    return source.prefix.rstrip("/").rpartition("/")[2] or source.bucket.rpartition("/")[2]


_PATTERNS = {"include": "include", "allow_patterns": "include", "exclude": "exclude", "ignore_patterns": "exclude"}
"""What a source's filters are called, here and by the Hub's library."""


def read_source(table: dict[str, Any], path: str) -> Source:
    """Read one ``[[sources]]`` table of the file ``path``.

    Raises:
        ConfigError: A key is unknown, or a value cannot be used.
    """
    where = f"{path}, [[sources]]"
    _check_table(table, where)
    source = parse_source(table["uri"])
    changes: dict[str, Any] = {"name": table["name"]} if "name" in table else {}
    for key in _PATTERNS.keys() & table.keys():
        value = table[key]
        changes[_PATTERNS[key]] = parse_patterns(value) if isinstance(value, str) else tuple(value)
    if "revision" in table:
        if source.scheme != "hf":
            raise ConfigError(f"{where}: {source.uri} has no revisions", "they are of hf:// alone")
        changes["revision"] = table["revision"]
    if "origin" in table:
        second = parse_source(table["origin"])
        if second.name or second.place == source.place:
            raise ConfigError(f"{where}: '{table['origin']}' cannot be the second place", "name another one")
        changes["origin"] = second.uri
    source = dataclasses.replace(source, **changes)
    again = parse_source(f"{source.name}={source.uri}" if source.name else source.uri)
    if again.revision != source.revision:
        raise ConfigError(f"{where}: '{source.revision}' is no revision", "write a branch, a tag or a commit")
    return source


def _check_table(table: dict[str, Any], where: str) -> None:
    known = ("uri", "name", "revision", "origin", *_PATTERNS)
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(
                f"{where}: unknown key '{key}'", f"did you mean '{near[0]}'?" if near else "see README.md"
            )
        listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not (isinstance(value, str) or (listed and key in _PATTERNS)):
            raise ConfigError(f"{where}: '{key}' has the wrong type", "write a string, patterns as a list of strings")
    if "uri" not in table:
        raise ConfigError(f"{where}: a source without uri", 'write uri = "s3://BUCKET/PREFIX/"')
