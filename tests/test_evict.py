"""``modelfs evict``: local copies, and with ``--remote`` the objects."""

import json
import os
import random

import pytest

from modelfs.chunks import CHUNK_BYTES
from tests.support.mounting import run

DATA = random.Random(14).randbytes(2 * CHUNK_BYTES + 5)
pytestmark = pytest.mark.fuse


@pytest.fixture
def mount(bucket, mounted):
    for name in ("one/model.safetensors", "two/model.safetensors"):
        bucket.put(f"m/{name}", DATA)
    made = mounted(bucket, "--prefetch", "all", prefix="m/")
    assert run("warm", str(made.path)).returncode == 0
    return made


def evict(mount, bucket, *words, expect=0):
    done = run("evict", *words, "--json", env={**os.environ, **bucket.store.environment()})
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout) if not expect else done.stderr


def on_disk(mount):
    return sum(path.stat().st_blocks * 512 for path in (mount.cache / "data").iterdir())


def test_local_copies_go_and_come_back(mount, bucket):
    before = on_disk(mount)
    found = evict(mount, bucket, str(mount.path / "one"))
    assert (found["freed_bytes"], found["in_use_files"], found["removed_objects"]) == (len(DATA), 0, 0)
    assert on_disk(mount) <= before - len(DATA) + 8192
    assert (mount.path / "one" / "model.safetensors").read_bytes() == DATA


def test_open_files_stay(mount, bucket):
    with (mount.path / "one" / "model.safetensors").open("rb") as file:
        assert evict(mount, bucket, str(mount.path))["in_use_files"] == 1
        assert file.read() == DATA
        before = mount.status()["fetch"]["received_bytes"]
    assert mount.status()["fetch"]["received_bytes"] == before


def test_objects_go_only_when_it_is_said(mount, bucket):
    assert "not confirmed" in evict(mount, bucket, str(mount.path / "one"), "--remote", expect=2)
    keys = {one["Key"] for one in bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]}
    assert len(keys) == 2
    assert evict(mount, bucket, str(mount.path / "one"), "--remote", "--yes")["removed_objects"] == 1
    keys = {one["Key"] for one in bucket.client.list_objects_v2(Bucket=bucket.name)["Contents"]}
    assert keys == {"m/two/model.safetensors"}


def test_what_does_not_exist(mount, bucket):
    assert "does not exist" in evict(mount, bucket, str(mount.path / "three"), expect=3)
