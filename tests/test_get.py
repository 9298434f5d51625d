"""``modelfs get`` and ``ls``: files without a mount."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time

import pytest

from modelfs.chunks import CHUNK_BYTES
from tests.support.hub import Hub
from tests.support.mounting import PROGRAM, Mounted, run

DATA = random.Random(10).randbytes(5 * CHUNK_BYTES + 333)
FILES = {"config.json": b"{}", "empty": b"", "model.safetensors": DATA, "sub/tokenizer.json": b"[1, 2]" * 1000}


@pytest.fixture
def get(bucket, tmp_path):
    for name, data in FILES.items():
        bucket.put(f"m/{name}", data)
    target = tmp_path / "a directory"

    def run_get(*options, expect=0, into=target, source=None, env=None):
        where = [str(into)] if into is not None else []
        done = run(
            "get",
            source or bucket.uri("m/"),
            *where,
            "--json",
            *options,
            env={**os.environ, **bucket.store.environment(), **(env or {})},
        )
        assert done.returncode == expect, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout) if not expect else done.stderr

    run_get.target = target
    return run_get


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".modelfs" not in path.parts
    }


def test_every_file_and_nothing_twice(get):
    result = get()
    assert contents(get.target) == FILES
    assert result == {
        "files": 4, "size_bytes": sum(map(len, FILES.values())), "fetched_bytes": sum(map(len, FILES.values())),
        "removed_files": 0,
    }  # fmt: skip
    assert (get.target / "model.safetensors").stat().st_mode & 0o777 == 0o644
    again = get()
    assert again["fetched_bytes"] == 0
    assert contents(get.target) == FILES


def test_only_what_changed_is_fetched_and_what_is_gone_is_removed(get, bucket):
    get()
    bucket.put("m/config.json", b"[3]")
    bucket.client.delete_object(Bucket=bucket.name, Key="m/sub/tokenizer.json")
    (get.target / "mine.txt").write_text("mine")
    result = get()
    assert (result["fetched_bytes"], result["removed_files"]) == (3, 1)
    left = {**FILES, "config.json": b"[3]", "mine.txt": b"mine"}
    del left["sub/tokenizer.json"]
    assert contents(get.target) == left


def test_files_that_were_written_to_are_mended(get):
    get()
    with (get.target / "model.safetensors").open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        file.write(b"broken")
    (get.target / "config.json").unlink()
    result = get()
    assert contents(get.target) == FILES
    assert result["fetched_bytes"] == CHUNK_BYTES


def test_killed_in_the_middle_and_run_again(get, bucket, rgw_server):
    big = random.Random(11).randbytes(14 * CHUNK_BYTES)
    bucket.put("m/big.safetensors", big)
    process = subprocess.Popen(
        [*PROGRAM, "get", bucket.uri("m/"), str(get.target), "--max-memory", "32MiB"],
        env={**os.environ, **bucket.store.environment()},
        stderr=subprocess.DEVNULL,
    )
    data = get.target / ".modelfs" / "data"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(
        path.stat().st_blocks * 512 > 3 * CHUNK_BYTES for path in data.glob("*")
    ):
        time.sleep(0.01)
    time.sleep(0.6)  # some of it has been recorded
    process.send_signal(signal.SIGKILL)
    process.wait()
    names = contents(get.target)
    assert not names or names == {**FILES, "big.safetensors": big}, "no name before everything is there"
    get()
    assert contents(get.target) == {**FILES, "big.safetensors": big}


def test_bytes_that_do_not_match_get_no_name(get, bucket):
    bucket.put("m/SHA256SUMS", f"{hashlib.sha256(b'other').hexdigest()}  model.safetensors\n".encode())
    line = get(expect=10)
    assert "model.safetensors" in line
    assert not (get.target / "model.safetensors").exists()
    get("--verify", "off")
    assert (get.target / "model.safetensors").read_bytes() == DATA


def test_filters_and_errors(get, tmp_path):
    assert get("--include", "*.json")["files"] == 2
    assert "no-such" in get(source="s3://no-such-bucket-1/x", expect=3)
    assert "is a file" in get(into=get.target / "config.json", expect=8)
    assert "needs a directory" in get(into=None, expect=2)
    (tmp_path / "file").write_text("")
    assert "cannot be used" in get(into=tmp_path / "file" / "below", expect=8)


def test_no_room_is_said_at_once_and_others_make_it(get, bucket, tmp_path):
    cache = ("--cache-dir", str(tmp_path / "cache"), "--min-free", "0B", "--max-memory", "32MiB")
    assert "do not fit into" in get(*cache, "--cache-size", "48MiB", into=None, expect=8)
    for number in range(2):
        bucket.put(f"other/{number}/model.safetensors", random.Random(number).randbytes(3 * CHUNK_BYTES))
    limited = (*cache, "--cache-size", "104MiB")
    get(*limited, into=None, source=bucket.uri("other/"))
    get(*limited, into=None)
    assert get(*limited, into=None)["fetched_bytes"] == 0
    assert get(*limited, into=None, source=bucket.uri("other/"))["fetched_bytes"] > 0


def test_several_damaged_chunks_are_all_mended(get):
    get()
    with (get.target / "model.safetensors").open("r+b") as file:
        for chunk in (1, 3):
            file.seek(chunk * CHUNK_BYTES + 7)
            file.write(b"broken")
    assert get()["fetched_bytes"] >= 2 * CHUNK_BYTES
    assert contents(get.target) == FILES


def test_links_in_the_directory_are_not_followed(get, tmp_path):
    (tmp_path / "outside").mkdir()
    get.target.mkdir()
    (get.target / "sub").symlink_to(tmp_path / "outside")
    assert "is no directory" in get(expect=8)
    assert not list((tmp_path / "outside").iterdir())
    (get.target / "sub").unlink()
    (tmp_path / "outside" / "mine").write_bytes(b"mine")
    (get.target / "config.json").unlink(missing_ok=True)
    (get.target / "config.json").symlink_to(tmp_path / "outside" / "mine")
    get()
    assert contents(get.target) == FILES
    assert (tmp_path / "outside" / "mine").read_bytes() == b"mine"


def test_names_that_meet_each_other(get, bucket):
    names = {"a": b"a", ".a.modelfs": b"b", ".empty.modelfs": b"c", "я" * 120 + ".bin": b"d"}
    for name, data in names.items():
        bucket.put(f"m/{name}", data)
    for _ in range(2):
        get()
        assert contents(get.target) == {**FILES, **names}


def test_file_that_becomes_a_directory_and_back(get, bucket):
    get()
    bucket.client.delete_object(Bucket=bucket.name, Key="m/config.json")
    bucket.put("m/config.json/x", b"1")
    get()
    assert (get.target / "config.json" / "x").read_bytes() == b"1"
    bucket.client.delete_object(Bucket=bucket.name, Key="m/config.json/x")
    bucket.put("m/config.json", b"{}")
    get()
    assert contents(get.target) == FILES


def test_hostile_key_cannot_write_into_the_store(get, bucket):
    bucket.put("m/.modelfs/placed.json", b"hostile")
    bucket.put("m/../../escaped", b"hostile")
    assert get()["files"] == 4
    assert get()["fetched_bytes"] == 0
    assert not (get.target.parent.parent / "escaped").exists()


def test_from_the_hub(get):
    with Hub().running() as hub:
        repository = hub.repository("org/model")
        repository.commit(**FILES)
        settings = {"source": "hf://org/model", "env": {"HF_ENDPOINT": hub.url}}
        get(**settings)
        assert contents(get.target) == FILES
        hub.served_bytes = 0
        repository.commit(**{"config.json": b"[4]"})
        assert get(**settings)["fetched_bytes"] == 3
        assert hub.served_bytes == 3


@pytest.mark.fuse
def test_filling_the_store_of_a_later_mount(get, bucket, tmp_path):
    cache = tmp_path / "cache"
    get("--cache-dir", str(cache), "--min-free", "64MiB", into=None)
    with Mounted(bucket.store, [bucket.uri("m/")], tmp_path) as mount:
        assert contents(mount.path) == FILES
        assert mount.metrics().get('modelfs_origin_bytes_total{scheme="s3"}', 0) == 0


def test_ls(get, bucket):
    env = {**os.environ, **bucket.store.environment()}
    done = run("ls", bucket.uri("m/"), env=env)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[:-1]] == sorted(FILES)
    assert "in 4 files" in done.stdout
    lines = run("ls", bucket.uri("m/"), "--json", "--include", "*.json", env=env).stdout.splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["config.json", "sub/tokenizer.json"]
    done = run("ls", "s3://no-such-bucket-1/", env=env)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)


@pytest.mark.fuse
def test_baked_directory_below_a_mount(get, bucket, tmp_path):
    """Nothing is downloaded where versions match; what changed or is damaged is, into the mount's own store."""
    get()
    lower = {path: path.stat().st_mtime_ns for path in get.target.rglob("*") if path.is_file()}
    options = ("--lower-dir", str(get.target), "--prefetch", "all", "--refresh", "1s")
    with Mounted(bucket.store, [bucket.uri("m/")], tmp_path, *options) as mount:
        assert contents(mount.path) == FILES
        assert mount.metrics().get('modelfs_origin_bytes_total{scheme="s3"}', 0) == 0
        bucket.put("m/config.json", b"[9]")
        deadline = time.monotonic() + 20
        while (mount.path / "config.json").read_bytes() != b"[9]" and time.monotonic() < deadline:
            time.sleep(0.2)
        assert contents(mount.path) == {**FILES, "config.json": b"[9]"}
        assert mount.metrics()['modelfs_origin_bytes_total{scheme="s3"}'] == 3
    now = {path: path.stat().st_mtime_ns for path in get.target.rglob("*") if path.is_file()}
    assert now == lower, "the store below is not written to"


@pytest.mark.fuse
def test_damaged_file_below_a_mount(get, bucket, tmp_path):
    get()
    broken = bytearray(DATA)
    broken[3 * CHUNK_BYTES + 9] ^= 1
    (get.target / "model.safetensors").write_bytes(broken)
    with Mounted(bucket.store, [bucket.uri("m/")], tmp_path, "--lower-dir", str(get.target)) as mount:
        assert (mount.path / "model.safetensors").read_bytes() == DATA
        assert mount.metrics()['modelfs_origin_bytes_total{scheme="s3"}'] >= CHUNK_BYTES
        assert "is damaged: fetched anew" in mount.log
    assert (get.target / "model.safetensors").read_bytes() == broken


def test_lower_directory_without_a_store(bucket, tmp_path):
    bucket.put("m/f", b"x")
    (tmp_path / "mnt").mkdir()
    done = run(
        "mount", bucket.uri("m/"), str(tmp_path / "mnt"), "--lower-dir", str(tmp_path), "--admin", "off",
        "--cache-dir", str(tmp_path / "cache"), env={**os.environ, **bucket.store.environment()},
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (8, 1)
    assert "there is no store in" in done.stderr
