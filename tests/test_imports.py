"""Configurations of other tools become sources of ours."""

import json
import tomllib

import pytest

from modelfs import config
from modelfs.errors import ConfigError
from modelfs.imports import read_foreign, to_toml
from modelfs.source import Source
from tests.support.mounting import run

TRUSS = """
model_name: demo
model_cache:
  - repo_id: org/llama
    revision: main
    allow_patterns: ["*.json", "*.safetensors"]
    ignore_patterns: ["original/*"]
    volume_folder: llama
    use_volume: true
  - repo_id: bucket/qwen
    kind: s3
"""
WEIGHTS = """
weights:
  - source: "hf://org/name@v2"
    mount_location: /models/first
    allow_patterns: ["*.json"]
  - source: gs://bucket/path
    mount_location: /models/second
"""


def read(tmp_path, text, name="config.yaml"):
    (tmp_path / name).write_text(text)
    return read_foreign(str(tmp_path / name))


def test_truss(tmp_path):
    assert read(tmp_path, TRUSS) == (
        Source("org/llama", "", "llama", "hf", "main", ("*.json", "*.safetensors"), ("original/*",)),
        Source("bucket", "qwen/", "qwen"),
    )
    assert read(tmp_path, WEIGHTS) == (
        Source("org/name", "", "first", "hf", "v2", ("*.json",)),
        Source("bucket", "path/", "second", "gs"),
    )


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"download_files_from": "s3://bucket/llama/"}, Source("bucket", "llama/")),
        ({"download_files_from": "org/name", "revision": "v1"}, Source("org/name", "", "", "hf", "v1")),
        ({"download_files_from": [{"uri": "gs://bucket/x", "name": "y"}]}, Source("bucket", "x/", "y", "gs")),
        ({"download_files_from": "org/name", "allow_patterns": ["*.gguf"]},
         Source("org/name", "", "", "hf", "", ("*.gguf",))),
    ],
)  # fmt: skip
def test_model_json(tmp_path, document, expected):
    assert read(tmp_path, json.dumps(document), "model.json") == (expected,)


def test_what_is_written_is_read_back(tmp_path):
    sources = read(tmp_path, TRUSS)
    (tmp_path / "c.toml").write_text(to_toml(sources))
    assert config.build([], "/mnt/x", {}, {}, str(tmp_path / "c.toml")).sources == sources


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "model_name: x", "names no model"),
        ("config.yaml", "a: [", "not valid YAML"),
        ("model.json", "{", "not valid JSON"),
        ("config.yaml", "model_cache: [3]", "wrong form"),
        ("config.yaml", "model_cache: [{repo_id: a/b, kind: azure}]", "by hand"),
        ("config.yaml", "weights: [{mount_location: /x}]", "no source"),
        ("config.yaml", "model_cache: [{repo_id: 'a b'}]", "write hf://"),
        ("model.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text, name)


def test_command(tmp_path):
    (tmp_path / "config.yaml").write_text(TRUSS)
    done = run("import", str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr
    assert [one["name"] for one in tomllib.loads(done.stdout)["sources"]] == ["llama", "qwen"]
    done = run("import", str(tmp_path / "nothing.yaml"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
