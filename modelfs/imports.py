"""Configurations of other tools, read as sources of ours.

- Truss: ``config.yaml`` with a ``model_cache`` (``repo_id``, ``revision``, ``allow_patterns``, ``ignore_patterns``,
  ``volume_folder``, ``kind``) or ``weights`` block (``source``, ``mount_location``, patterns).
- ``model.json`` with ``download_files_from``: a URI, or a list of URIs or tables; beside it ``revision`` and patterns.

What names a repository without a scheme is one of the Hub. Pure but for reading the file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from modelfs.errors import ConfigError
from modelfs.source import Source, name_sources, read_source

_KINDS = {"hf": "hf://", "gcs": "gs://", "s3": "s3://"}
_PATTERNS = ("allow_patterns", "ignore_patterns")


def read_foreign(path: str) -> tuple[Source, ...]:
    """Return the sources that a file of another tool names.

    Raises:
        ConfigError: The file cannot be read, or names none.
    """
    document = _read(path)
    if isinstance(document, dict):
        tables = [
            *(_truss_cache(entry, path) for entry in _entries(document, "model_cache", path)),
            *(_truss_weights(entry, path) for entry in _entries(document, "weights", path)),
            *(_download(entry, document) for entry in _entries(document, "download_files_from", path)),
        ]
        if tables:
            return name_sources([read_source(table, path) for table in tables])
    raise ConfigError(f"{path} names no model", "it needs model_cache, weights or download_files_from")


def _read(path: str) -> object:
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            return json.loads(text)
        import yaml  # noqa: PLC0415 - an extra

        return yaml.safe_load(text)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path} needs the Python package PyYAML", "pip install 'modelfs[yaml]'") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read", "check its name and mode") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON", "mend it") from error
    except Exception as error:  # yaml.YAMLError, where yaml may be missing
        raise ConfigError(f"{path} is not valid YAML", "mend it") from error


def _entries(document: dict[str, Any], key: str, path: str) -> list[Any]:
    value = document.get(key) or []
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict | str) for entry in entries):
        raise ConfigError(f"{path}: '{key}' has the wrong form", "write a list of tables")
    return entries


def _truss_cache(entry: Any, path: str) -> dict[str, Any]:  # noqa: ANN401
    table = entry if isinstance(entry, dict) else {"repo_id": entry}
    kind = table.get("kind", "hf")
    if not isinstance(kind, str) or kind not in _KINDS or not isinstance(table.get("repo_id"), str):
        raise ConfigError(
            f"{path}: a model_cache entry of kind '{kind}' cannot be read", "write its source by hand, see README.md"
        )
    uri = table["repo_id"] if "://" in table["repo_id"] else _KINDS[kind] + table["repo_id"]
    return _table(uri, table, table.get("volume_folder", ""))


def _truss_weights(entry: Any, path: str) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        raise ConfigError(f"{path}: a weights entry has no source", "write source: hf://ORG/NAME")
    return _table(_with_scheme(entry["source"]), entry, Path(str(entry.get("mount_location", ""))).name)


def _download(entry: Any, document: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    if isinstance(entry, str):
        return _table(_with_scheme(entry), document, str(document.get("name", "")))
    uri = str(entry.get("uri") or entry.get("url") or entry.get("source") or "")
    return _table(_with_scheme(uri), entry, str(entry.get("name", "")))


def _with_scheme(text: str) -> str:
    return text if "://" in text else f"hf://{text}"


def _table(uri: str, found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a ``[[sources]]`` table of what is known here."""
    table: dict[str, Any] = {"uri": uri}
    if name:
        table["name"] = name
    if found.get("revision") and uri.startswith("hf://"):
        table["revision"] = str(found["revision"])
    table |= {key: found[key] for key in _PATTERNS if found.get(key)}
    return table


def to_toml(sources: tuple[Source, ...]) -> str:
    """Return the sources as they are written in a configuration file."""
    lines = []
    for source in sources:
        plain = dataclasses.replace(source, revision="")
        lines += ["[[sources]]", f"uri = {_toml(plain.uri)}"]
        lines += [f"{key} = {_toml(value)}" for key in ("name", "revision") if (value := getattr(source, key))]
        lines += [f"{key} = {_toml(list(value))}" for key in ("include", "exclude") if (value := getattr(source, key))]
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    """Return a string or a list of strings; JSON writes them as TOML does, but for characters beyond 16 bits."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
