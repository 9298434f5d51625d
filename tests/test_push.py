"""``modelfs push``: resumed after a kill, complete for readers or not at all."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelfs.config import OriginConfig
from modelfs.errors import ConfigError
from modelfs.metrics import Metrics
from modelfs.origins.s3_target import PART_BYTES, S3Target
from modelfs.source import Source
from modelfs.sources import MARKER
from tests.conftest import Bucket
from tests.support.hub import Hub
from tests.support.mounting import PROGRAM, Mounted, run

DATA = random.Random(12).randbytes(PART_BYTES + 333)
FILES = {"config.json": b"{}", "model.safetensors": DATA, "sub/empty": b""}


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    for name, data in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def push(bucket, model, tmp_path):
    def run_push(*options, source=model, expect=0, env=None):
        environment = {**os.environ, **bucket.store.environment(), "XDG_CACHE_HOME": str(tmp_path), **(env or {})}
        cache = ["--cache-dir", str(tmp_path / "staging")]
        done = run("push", str(source), bucket.uri("p/"), "--json", *cache, *options, env=environment)
        assert done.returncode == expect, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout) if not expect else done.stderr

    return run_push


def contents(bucket: Bucket) -> dict[str, bytes]:
    pages = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix="p/").get("Contents", ())
    return {
        one["Key"].removeprefix("p/"): bucket.client.get_object(Bucket=bucket.name, Key=one["Key"])["Body"].read()
        for one in pages
    }


def sums(files):
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode()


def test_ministack_as_well(ministack_store, new_bucket, model):
    """Its multipart uploads and checks are of another make."""
    bucket = new_bucket(ministack_store)
    environment = {**os.environ, **bucket.store.environment()}
    for sent in (2, 0):
        done = run("push", str(model), bucket.uri("p/"), "--json", env=environment)
        assert (done.returncode, json.loads(done.stdout)["sent_files"]) == (0, sent), done.stderr
    assert contents(bucket) == {**FILES, "SHA256SUMS": sums(FILES)}


def test_everything_is_there_and_nothing_is_sent_twice(push, bucket, model):
    result = push()
    assert contents(bucket) == {**FILES, "SHA256SUMS": sums(FILES)}
    total = sum(map(len, FILES.values()))
    assert result == {"files": 3, "size_bytes": total, "sent_files": 2, "sent_bytes": total, "removed_files": 0}
    assert push()["sent_bytes"] == 0
    (model / "config.json").write_bytes(b"[7]")
    (model / "sub" / "empty").unlink()
    assert push()["sent_bytes"] == 3
    assert "sub/empty" in contents(bucket)
    assert push("--delete")["removed_files"] == 1
    left = {"config.json": b"[7]", "model.safetensors": DATA}
    assert contents(bucket) == {**left, "SHA256SUMS": sums(left)}


@pytest.mark.fuse
def test_killed_halfway_and_run_again(push, bucket, model, tmp_path):
    """Nobody sees a part of it in between; the rest is sent, and nothing else."""
    push()
    big = random.Random(13).randbytes(6 * PART_BYTES)
    (model / "big.safetensors").write_bytes(big)
    (model / "config.json").write_bytes(b"[8]")
    with Mounted(bucket.store, [bucket.uri("p/")], tmp_path, "--refresh", "1s") as mount:
        before = sorted(os.listdir(mount.path))
        process = subprocess.Popen(
            [*PROGRAM, "push", str(model), bucket.uri("p/")],
            env={**os.environ, **bucket.store.environment()}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and arrived(bucket) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        parts = arrived(bucket)
        assert 2 <= parts < 6
        time.sleep(2.5)
        assert sorted(os.listdir(mount.path)) == before, "the last complete model, or nothing"
        done = run("ls", bucket.uri("p/"), env={**os.environ, **bucket.store.environment()})
        assert (done.returncode, "is being written" in done.stderr) == (3, True)
        result = push()
        assert result["sent_bytes"] <= len(big) - parts * PART_BYTES + 3
        deadline = time.monotonic() + 20
        while "big.safetensors" not in os.listdir(mount.path) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert (mount.path / "big.safetensors").read_bytes() == big
    now = {**FILES, "config.json": b"[8]", "big.safetensors": big}
    assert contents(bucket) == {**now, "SHA256SUMS": sums(now)}


def arrived(bucket) -> int:
    """Return how many parts of the big file have arrived."""
    uploads = bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", ())
    return sum(
        len(bucket.client.list_parts(Bucket=bucket.name, Key=one["Key"], UploadId=one["UploadId"]).get("Parts", ()))
        for one in uploads
    )


def test_upload_that_other_bytes_had_begun(push, bucket, model):
    """The metadata of a broken-off upload are of the file as it was then."""
    made = bucket.client.create_multipart_upload(
        Bucket=bucket.name, Key="p/model.safetensors", Metadata={"sha256": "0" * 64}
    )
    bucket.client.upload_part(
        Bucket=bucket.name, Key="p/model.safetensors", UploadId=made["UploadId"], PartNumber=1, Body=DATA[:PART_BYTES]
    )
    push()
    head = bucket.client.head_object(Bucket=bucket.name, Key="p/model.safetensors")
    assert head["Metadata"]["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert contents(bucket)["model.safetensors"] == DATA
    assert push()["sent_bytes"] == 0


def test_directory_beside_one_that_is_being_written_is_shown(push, bucket):
    push()
    bucket.put("other/f", b"x")
    bucket.put(f"p/{MARKER}", b"{}")
    bucket.put("p/deep/er", b"x")
    done = run("ls", bucket.uri(), "--json", env={**os.environ, **bucket.store.environment()})
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["other/f"]
    assert "is not shown" in done.stderr


def test_archive(push, bucket, model, tmp_path):
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as made:
        made.add(model, ".")
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "config.json"
        made.addfile(link)
    push(source=archive)
    files = {**FILES, "link": FILES["config.json"]}
    assert contents(bucket) == {**files, "SHA256SUMS": sums(files)}
    assert not list((tmp_path / "staging").iterdir())


def test_hostile_archive(push, bucket, tmp_path):
    archive = tmp_path / "model.tar"
    with tarfile.open(archive, "w") as made:
        entry = tarfile.TarInfo("../../escaped")
        entry.size = 3
        made.addfile(entry, io.BytesIO(b"bad"))
    assert "cannot be unpacked" in push(source=archive, expect=2)
    assert not list(tmp_path.parent.rglob("escaped"))
    assert contents(bucket) == {}


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_damaged_archive(push, bucket, model, tmp_path, how):
    """What only the end of the stream tells is noticed as well."""
    archive = tmp_path / ("model.tar" if how == "cut" else "model.tar.gz")
    with tarfile.open(archive, "w" if how == "cut" else "w:gz") as made:
        made.add(model / "config.json", "config.json")
        made.add(model / "model.safetensors", "model.safetensors")
    data = bytearray(archive.read_bytes())
    if how == "cut":
        data = data[: -10240 - 512]
    else:
        data[-5] ^= 1
    archive.write_bytes(data)
    assert "cannot be unpacked" in push(source=archive, expect=2)
    assert contents(bucket) == {}


def test_archive_that_was_changed_after_a_failure(push, bucket, tmp_path):
    archive = tmp_path / "model.tar"
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(name.encode())
        with tarfile.open(archive, "w") as made:
            made.add(tmp_path / name, name)
        if name == "old":
            push(source=archive, expect=4, env={"AWS_SECRET_ACCESS_KEY": "wrong"})
    push(source=archive)
    assert contents(bucket).keys() == {"new", "SHA256SUMS"}


def test_nothing_to_push_removes_nothing(push, bucket):
    push()
    assert "no file to push" in push("--include", "*.typo", "--delete", expect=2)
    assert contents(bucket).keys() == {*FILES, "SHA256SUMS"}


def test_file_that_changes_while_it_is_sent(model, bucket, tmp_path, monkeypatch):
    for name, value in bucket.store.environment().items():
        monkeypatch.setenv(name, value)
    target = S3Target(source=Source(bucket.name, "p/"), config=OriginConfig(), count=Metrics().origin_counter("s3"))
    with ThreadPoolExecutor(2) as pool, pytest.raises(ConfigError, match="has changed"):
        target.send("p/x", model / "model.safetensors", "0" * 64, pool, lambda count, was_sent: None)
    with ThreadPoolExecutor(2) as pool, pytest.raises(ConfigError, match="has changed"):
        target.send("p/y", model / "config.json", "0" * 64, pool, lambda count, was_sent: None)
    assert contents(bucket) == {}


def test_from_the_hub(push, bucket):
    with Hub().running() as hub:
        hub.repository("org/model").commit(**FILES)
        push(source="hf://org/model", env={"HF_ENDPOINT": hub.url})
    assert contents(bucket) == {**FILES, "SHA256SUMS": sums(FILES)}


def test_errors(push, tmp_path, model):
    assert "does not exist" in push(source=tmp_path / "not", expect=2)
    (tmp_path / "file.bin").write_bytes(b"x")
    assert "no tar archive" in push(source=tmp_path / "file.bin", expect=2)
    (tmp_path / "none").mkdir()
    assert "no file to push" in push(source=tmp_path / "none", expect=2)
    done = run("push", str(model), "hf://org/name")
    assert (done.returncode, "cannot be written to" in done.stderr) == (2, True)
    assert push("--include", "*.json")["files"] == 1
