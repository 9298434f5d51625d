"""The Hub-shaped view: huggingface_hub itself finds models in it."""

import json
import os
import subprocess
import sys

import pytest

from modelfs.chunks import ObjectId, ObjectInfo
from modelfs.config import TreeConfig
from modelfs.layout import commit_of
from modelfs.tree import Listing, Tree
from tests.support.hub import Hub
from tests.support.mounting import Mounted

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights" * 9000, "sub/a.json": b"[]"}


def info(key: str, version: str = "v1", locator: str = "") -> ObjectInfo:
    return ObjectInfo(ObjectId("s3://b", key, version), 5, 7, locator)


def tree(*infos: ObjectInfo, name: str = "", prefix: str = "p/", revision: str = "") -> Tree:
    listing = Listing(name, (("s3://b", prefix),), infos, revision=revision)
    return Tree([listing], TreeConfig(layout="hf"))


def paths(built: Tree) -> set[str]:
    return {file.path for file in built.root.walk()}


def test_directories_of_a_bucket():
    infos = (
        info("p/org/one/config.json"),
        info("p/org/one/sub/x"),
        info("p/org/two/w"),
        info("p/README"),
        info("p/o/f"),
    )
    one = commit_of([("config.json", infos[0]), ("sub/x", infos[1])])
    two = commit_of([("w", infos[2])])
    assert paths(tree(*infos)) == {
        "models--org--one/refs/main", f"models--org--one/snapshots/{one}/config.json",
        f"models--org--one/snapshots/{one}/sub/x", "models--org--two/refs/main", f"models--org--two/snapshots/{two}/w",
    }  # fmt: skip


def test_commit_is_the_hubs_or_changes_with_the_files():
    ours = "a" * 40
    assert commit_of([("x", info("x", locator=ours)), ("y", info("y", locator=ours))]) == ours
    first = commit_of([("x", info("x"))])
    assert first == commit_of([("x", info("x"))]) != commit_of([("x", info("x", version="v2"))])
    assert len(first) == 40


def test_revision_is_a_reference_too():
    built = tree(info("p/f"), name="org/one", revision="v1.0")
    references = {path for path in paths(built) if "/refs/" in path}
    assert references == {"models--org--one/refs/main", "models--org--one/refs/v1.0"}
    commit = commit_of([("f", info("p/f"))])
    assert len([path for path in paths(tree(info("p/f"), name="org/one", revision=commit)) if "/refs/" in path]) == 1


PROGRAM = """
import json, sys
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
name = sys.argv[1]
print(json.dumps({
    "config": open(hf_hub_download(name, "config.json")).read(),
    "weights": len(open(hf_hub_download(name, "model.safetensors"), "rb").read()),
    "snapshot": snapshot_download(name),
    "missing": str(try_to_load_from_cache(name, "not.json")),
}))
"""


def offline(mount, name):
    environment = {**os.environ, "HF_HUB_CACHE": str(mount.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.fuse
def test_huggingface_hub_finds_models_of_a_bucket_offline(bucket, tmp_path):
    for name, data in FILES.items():
        bucket.put(f"models/org/name/{name}", data)
    with Mounted(bucket.store, [bucket.uri("models/")], tmp_path, "--layout", "hf") as mount:
        found = offline(mount, "org/name")
        assert found["config"] == FILES["config.json"].decode()
        assert found["weights"] == len(FILES["model.safetensors"])
        assert found["snapshot"].startswith(f"{mount.path}/models--org--name/snapshots/")
        assert found["missing"] == "None"


@pytest.mark.fuse
def test_huggingface_hub_finds_what_lies_on_the_hub(bucket, tmp_path):
    with Hub().running() as hub:
        commit = hub.repository("org/name").commit(**FILES)
        environment = {"HF_ENDPOINT": hub.url}
        options = ("--layout", "hf", "--verify", "strict")
        with Mounted(bucket.store, ["hf://org/name"], tmp_path, *options, env=environment) as mount:
            found = offline(mount, "org/name")
            assert found["snapshot"] == f"{mount.path}/models--org--name/snapshots/{commit}"
            assert found["weights"] == len(FILES["model.safetensors"])
