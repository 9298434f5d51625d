"""Real mounts of real buckets through the kernel."""

import contextlib
import errno
import filecmp
import json
import mmap
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from modelfs.chunks import CHUNK_BYTES, MIB
from modelfs.cli.client import ask
from modelfs.cli.embedded import free_port
from modelfs.fuse.tuning import control_socket
from tests.faults.front import Front
from tests.support import differential
from tests.support.mounting import run

pytestmark = pytest.mark.fuse

SIZES = {
    "empty": 0,
    "one": 1,
    "page": 4096,
    "chunk": CHUNK_BYTES,
    "two-chunks": 2 * CHUNK_BYTES,
    "odd": CHUNK_BYTES + 12345,
}


def some_bytes(size, seed=0):
    return random.Random(seed).randbytes(size)


def drop_pages(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("prefetch", ["off", "auto"])
def test_every_size_reads_whole_cold_warm_and_mapped(bucket, mounted, prefetch):
    data = {name: bucket.put(f"p/{name}", some_bytes(size, name)) for name, size in SIZES.items()}
    mount = mounted(bucket, "--prefetch", prefetch, prefix="p/")
    assert sorted(os.listdir(mount.path)) == sorted(SIZES)
    for _ in range(2):
        for name, expected in data.items():
            path = mount.path / name
            assert path.read_bytes() == expected
            assert path.stat().st_size == len(expected)
            if expected:
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                    assert mapped[:] == expected
            drop_pages(path)


def test_attributes_listing_and_statfs(bucket, mounted):
    for key in ("p/shard-10", "p/shard-2", "p/sub dir/ä 模型.json", "p/shard-1"):
        bucket.put(key, b"xyz")
    mount = mounted(bucket, "--uid", "12", "--gid", "34", "--umask", "0227", prefix="p/")
    assert os.listdir(mount.path) == ["shard-1", "shard-2", "shard-10", "sub dir"]
    assert (mount.path / "sub dir" / "ä 模型.json").read_bytes() == b"xyz"
    found = (mount.path / "shard-2").stat()
    head = bucket.client.head_object(Bucket=bucket.name, Key="p/shard-2")
    assert int(found.st_mtime) == int(head["LastModified"].timestamp())
    assert stat.S_IMODE(found.st_mode) == 0o440
    assert (found.st_uid, found.st_gid, found.st_nlink, found.st_blocks) == (12, 34, 1, 1)
    room = os.statvfs(mount.path)
    assert room.f_blocks > 0
    assert room.f_bavail == 0
    fields = subprocess.check_output(["findmnt", "-no", "FSTYPE,OPTIONS,SOURCE", str(mount.path)], text=True).split()
    assert fields[0] == "fuse.modelfs"
    assert {"ro", "nosuid", "nodev", "noatime"} <= set(fields[1].split(","))
    assert fields[2] == bucket.uri("p/")


def test_extended_attributes(bucket, mounted):
    data = bucket.put("p/f", some_bytes(CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="p/")
    path = mount.path / "f"
    assert set(os.listxattr(path)) == {f"user.modelfs.{word}" for word in ("etag", "uri", "resident_bytes", "digest")}
    etag = bucket.client.head_object(Bucket=bucket.name, Key="p/f")["ETag"].strip('"')
    assert os.getxattr(path, "user.modelfs.etag").decode() == etag
    assert os.getxattr(path, "user.modelfs.uri").decode() == bucket.uri("p/f")
    assert os.getxattr(path, "user.modelfs.resident_bytes") == b"0"
    assert os.getxattr(path, "user.modelfs.digest") == b"partial"
    assert path.read_bytes() == data
    mount.wait_complete("f")
    assert os.getxattr(path, "user.modelfs.resident_bytes") == str(len(data)).encode()
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.other")


def test_every_write_is_refused(bucket, mounted):
    bucket.put("p/f", b"data")
    bucket.put("p/d/g", b"data")
    mount = mounted(bucket, prefix="p/")
    path, directory = mount.path / "f", mount.path / "d"
    attempts = [
        lambda: path.open("wb"),
        lambda: path.open("r+b"),
        lambda: (mount.path / "new").open("wb"),
        path.unlink,
        lambda: path.rename(mount.path / "h"),
        (mount.path / "dir").mkdir,
        directory.rmdir,
        lambda: os.truncate(path, 1),
        lambda: os.chmod(path, 0o777),
        lambda: os.utime(path),
        lambda: os.symlink("a", mount.path / "link"),
        lambda: os.link(path, mount.path / "hard"),
        lambda: os.setxattr(path, "user.x", b"1"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is checked
            attempt()
        assert caught.value.errno == errno.EROFS
    assert path.read_bytes() == b"data"


def test_bad_keys_are_skipped_with_one_warning(bucket, mounted):
    for key in ("p/ok", "p/a//b", "p/../up", "p/" + "l" * 300, "p/dir", "p/dir/f"):
        bucket.put(key, b"x")
    mount = mounted(bucket, prefix="p/")
    assert sorted(os.listdir(mount.path)) == ["dir", "ok"]
    assert (mount.path / "dir").is_dir()
    assert mount.log.count("cannot be shown as files") == 1
    assert mount.status()["skipped_keys"] == {"empty_part": 1, "dot_part": 1, "name_too_long": 1, "shadowed": 1}


def test_several_sources_are_directories(bucket, mounted):
    bucket.put("a/f", b"1")
    bucket.put("b/f", b"2")
    mount = mounted(bucket, sources=[bucket.uri("a/"), f"other={bucket.uri('b')}"])
    assert sorted(os.listdir(mount.path)) == ["a", "other"]
    assert (mount.path / "other" / "f").read_bytes() == b"2"


@pytest.mark.nightly
def test_ten_thousand_keys(bucket, mounted):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: bucket.put(f"p/file-{number}", b""), range(10_000)))
    mount = mounted(bucket, prefix="p/")
    names = os.listdir(mount.path)
    assert names == [f"file-{number}" for number in range(10_000)]
    done = subprocess.run(["ls", "-l", str(mount.path)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 10_001


def test_inodes_are_stable_across_remounts_and_the_cache_is_warm(bucket, mounted, tmp_path):
    data = bucket.put("p/f", some_bytes(3 * CHUNK_BYTES))
    mount = mounted(bucket, prefix="p/")
    inode = (mount.path / "f").stat().st_ino
    assert (mount.path / "f").read_bytes() == data
    mount.wait_complete("f")
    assert mount.stop() == 0
    again = mounted(bucket, prefix="p/")
    assert (again.path / "f").stat().st_ino == inode
    assert again.status()["cache"]["resident_bytes"] == len(data)
    assert (again.path / "f").read_bytes() == data
    assert again.status()["origin"]["bytes"] == 0


def test_differential_readers_under_eviction(bucket, mounted):
    """Random preads and mmaps against a local copy; the cap is a third of the data."""
    for number in range(len(differential.SIZES)):
        bucket.put(f"p/f{number}", differential.file_bytes(number))
    cap = f"{differential.CAP_MIB}MiB"
    mount = mounted(
        bucket, "--cache-size", cap, "--min-free", "1MiB", "--max-memory", "32MiB", "--prefetch", "off", prefix="p/"
    )
    outcome = differential.compare(mount.path, reads=1500)
    assert outcome.reads >= 1500
    assert not outcome.wrong
    cache = mount.status()["cache"]
    assert cache["evicted_bytes"] > 0
    assert cache["resident_bytes"] <= (differential.CAP_MIB + 32) * MIB


def test_direct_io_reader(bucket, mounted):
    data = bucket.put("p/f", some_bytes(2 * CHUNK_BYTES + 512))
    mount = mounted(bucket, "--prefetch", "off", prefix="p/")
    descriptor = os.open(mount.path / "f", os.O_RDONLY | os.O_DIRECT)
    try:
        target = mmap.mmap(-1, 16 * MIB)
        for offset, size in [(512, 1048064), (0, 4 * MIB), (CHUNK_BYTES - 512, 4096), (2 * CHUNK_BYTES - MIB, 2 * MIB)]:
            count = os.preadv(descriptor, [memoryview(target)[:size]], offset)
            assert count == min(size, len(data) - offset)
            assert target[:count] == data[offset : offset + count]
    finally:
        os.close(descriptor)


@pytest.mark.nightly
def test_small_object_with_a_large_sparse_sibling(bucket, mounted):
    """An object beyond 5 GiB: ends and middle, without fetching the rest."""
    size = 5 * 1024 * MIB + CHUNK_BYTES + 9
    part = 1024 * MIB
    upload = bucket.client.create_multipart_upload(Bucket=bucket.name, Key="p/huge")["UploadId"]
    zeros, parts = bytes(part), []
    for number in range(1, 7):
        body = zeros if number < 6 else bytes(size - 5 * part - 3) + b"end"
        done = bucket.client.upload_part(
            Bucket=bucket.name, Key="p/huge", UploadId=upload, PartNumber=number, Body=body
        )
        parts.append({"ETag": done["ETag"], "PartNumber": number})
    bucket.client.complete_multipart_upload(
        Bucket=bucket.name, Key="p/huge", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    try:
        mount = mounted(bucket, "--prefetch", "off", prefix="p/")
        path = mount.path / "huge"
        assert path.stat().st_size == size
        with path.open("rb") as file:
            assert os.pread(file.fileno(), 100, size - 3) == b"end"
            assert os.pread(file.fileno(), 10, 4 * 1024 * MIB - 5) == bytes(10)
            assert os.pread(file.fileno(), 10, size) == b""
        assert mount.status()["origin"]["bytes"] < 200 * MIB
    finally:
        bucket.client.delete_object(Bucket=bucket.name, Key="p/huge")


@pytest.mark.nightly
def test_worker_killed_five_times_during_cmp(bucket, mounted, tmp_path):
    """Readers finish with right bytes and the mount never disappears."""
    data = some_bytes(192 * MIB)
    bucket.put("p/f", data)
    local = tmp_path / "local"
    local.write_bytes(data)
    mount = mounted(bucket, prefix="p/")
    reader = subprocess.Popen(
        ["python3", "-c", f"""
import time
with open({str(mount.path / "f")!r}, "rb", buffering=0) as a, open({str(local)!r}, "rb", buffering=0) as b:
    while True:
        x, y = a.read(1 << 20), b.read(1 << 20)
        assert x == y
        if not x:
            break
        time.sleep(0.02)
"""],
    )  # fmt: skip
    for _ in range(5):
        time.sleep(0.3)
        assert reader.poll() is None
        mount.kill_worker()
        assert stat.S_ISREG((mount.path / "f").stat().st_mode)
    assert reader.wait(60) == 0
    assert mount.status()["worker_starts"] >= 2
    assert filecmp.cmp(mount.path / "f", local, shallow=False)


def test_reopened_file_ends_in_passthrough(bucket, mounted):
    """Opened before it is complete, again beside that, closed, opened again: the last open passes through."""
    data = bucket.put("p/f", some_bytes(4 * CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="p/")
    path = mount.path / "f"
    assert mount.status()["kernel"]["passthrough"], mount.status()["kernel"]["hints"]

    def mode():
        return mount.status()["sources"][0]["files"][0].get("in_use")

    with path.open("rb") as first:
        assert first.read() == data
        mount.wait_complete("f")
        with path.open("rb") as second:
            assert mode() == "cached"
            assert second.read() == data
    time.sleep(2)  # past the next commit: a chunk that is not recorded yet would be fetched anew after the kill
    with path.open("rb") as third:
        assert mode() == "passthrough"
        assert third.read() == data
        with path.open("rb") as fourth, mmap.mmap(fourth.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            mount.kill_worker()
            assert run("wait", str(mount.path), "--timeout", "20s").returncode == 0
            assert mode() == "passthrough"
            assert mapped[:] == data
            assert path.read_bytes() == data
    with path.open("rb") as fifth:
        assert mode() == "passthrough"
        assert fifth.read() == data


def test_without_passthrough_everything_still_works(bucket, tmp_path):
    """In a user namespace the kernel refuses backing files, as in an unprivileged container."""
    data = bucket.put("m/model.safetensors", some_bytes(2 * CHUNK_BYTES))
    point, program = tmp_path / "mnt", f"{sys.executable} -m modelfs"
    point.mkdir()
    script = f"""
        {program} mount {bucket.uri("m/")} {point} --background --admin off --cache-dir {tmp_path / "cache"} \
            --cache-size 1GiB --min-free 1MiB || exit 1
        {program} wait {point} --for complete --timeout 30s || exit 2
        cat {point}/model.safetensors > {tmp_path / "copy"} || exit 3
        {program} status {point} || exit 4
        {program} umount {point} || exit 5
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env={**os.environ, **bucket.store.environment()},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    log = (tmp_path / "cache" / "modelfs.log").read_text()
    assert done.returncode == 0, f"{done.stderr}{log}"
    assert (tmp_path / "copy").read_bytes() == data
    assert "passthrough off" in done.stdout
    assert "needs Linux 6.9 and CAP_SYS_ADMIN" in done.stdout
    assert "passthrough is off, files are served by copy" in log


def test_safetensors_arrays_are_equal(bucket, mounted, tmp_path):
    rng = np.random.default_rng(1)
    for shard in (1, 2):
        arrays = {f"w{shard}.{n}": rng.standard_normal((256, 1024), dtype=np.float32) for n in range(12)}
        safetensors.numpy.save_file(arrays, tmp_path / f"model-0000{shard}-of-00002.safetensors")
    for path in tmp_path.glob("*.safetensors"):
        bucket.client.upload_file(str(path), bucket.name, f"m/{path.name}")
    mount = mounted(bucket, prefix="m/")
    for path in sorted(tmp_path.glob("*.safetensors")):
        local, remote = safetensors.numpy.load_file(path), safetensors.numpy.load_file(mount.path / path.name)
        assert local.keys() == remote.keys()
        assert all(np.array_equal(local[key], remote[key]) for key in local)


def test_prefetch_skips_duplicates_until_opened(bucket, mounted):
    bucket.put("m/config.json", b"{}")
    bucket.put("m/model.safetensors", some_bytes(2 * CHUNK_BYTES))
    data = bucket.put("m/pytorch_model.bin", some_bytes(2 * CHUNK_BYTES, 1))
    mount = mounted(bucket, prefix="m/")
    mount.wait_complete()
    assert not any("in_use" in file for file in mount.status()["sources"][0]["files"])
    states = {file["path"]: file["state"] for file in mount.status()["sources"][0]["files"]}
    assert states == {"config.json": "complete", "model.safetensors": "complete", "pytorch_model.bin": "remote"}
    assert (mount.path / "pytorch_model.bin").read_bytes() == data


def test_prefetch_of_several_models_begins_at_the_first_touch(bucket, mounted):
    for model in ("a", "b"):
        bucket.put(f"m/{model}/model.safetensors", some_bytes(CHUNK_BYTES, model))
    mount = mounted(bucket, prefix="m/")
    subprocess.run(["ls", "-l", str(mount.path)], check=True, capture_output=True)
    time.sleep(0.3)
    assert mount.status()["cache"]["resident_bytes"] == 0
    os.listdir(mount.path / "a")
    deadline = time.monotonic() + 20
    while mount.status()["cache"]["resident_bytes"] < CHUNK_BYTES and time.monotonic() < deadline:
        time.sleep(0.05)
    states = {file["path"]: file["state"] for file in mount.status()["sources"][0]["files"]}
    assert states == {"a/model.safetensors": "complete", "b/model.safetensors": "remote"}


def test_refresh_shows_a_new_version_as_a_new_inode(bucket, mounted):
    old = bucket.put("p/f", some_bytes(CHUNK_BYTES))
    mount = mounted(bucket, "--refresh", "1s", prefix="p/")
    path = mount.path / "f"
    with path.open("rb") as before:
        assert before.read() == old
        inode = os.fstat(before.fileno()).st_ino
        new = bucket.put("p/f", some_bytes(CHUNK_BYTES + 1, 9))
        deadline = time.monotonic() + 20
        while path.stat().st_ino == inode and time.monotonic() < deadline:
            time.sleep(0.1)
        assert path.read_bytes() == new
        assert os.pread(before.fileno(), CHUNK_BYTES, 0) == old


def test_overwritten_object_never_gives_mixed_bytes(bucket, mounted):
    old = bucket.put("p/f", some_bytes(4 * CHUNK_BYTES))
    mount = mounted(bucket, "--refresh", "off", "--prefetch", "off", prefix="p/")
    with (mount.path / "f").open("rb") as file:
        assert os.pread(file.fileno(), 100, 0) == old[:100]
        bucket.put("p/f", some_bytes(4 * CHUNK_BYTES, 9))
        with pytest.raises(OSError) as caught:  # noqa: PT011
            os.pread(file.fileno(), 100, 3 * CHUNK_BYTES + CHUNK_BYTES // 2)
        assert caught.value.errno in {errno.ESTALE, errno.EIO}
        assert os.pread(file.fileno(), 100, 0) == old[:100]


@pytest.mark.parametrize("change", ["overwritten", "deleted"])
def test_pinned_versions_stay_readable(bucket, mounted, change):
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    bucket.put("p/f", b"older")
    old = bucket.put("p/f", some_bytes(4 * CHUNK_BYTES))
    bucket.put("p/deleted", b"x")
    bucket.client.delete_object(Bucket=bucket.name, Key="p/deleted")
    mount = mounted(bucket, "--refresh", "off", "--prefetch", "off", "--pin-versions", prefix="p/")
    assert os.listdir(mount.path) == ["f"]
    with (mount.path / "f").open("rb") as file:
        assert os.pread(file.fileno(), 100, 0) == old[:100]
        if change == "overwritten":
            bucket.put("p/f", some_bytes(4 * CHUNK_BYTES, 9))
        else:
            bucket.client.delete_object(Bucket=bucket.name, Key="p/f")
        assert os.pread(file.fileno(), len(old), 0) == old
    assert b"?versionId=" in os.getxattr(mount.path / "f", "user.modelfs.etag")
    assert run("verify", str(mount.path)).returncode == 0


def test_an_immutable_mount_is_listed_once_and_needs_no_store_when_warm(bucket, mounted, rgw_server):
    data = bucket.put("p/f", some_bytes(CHUNK_BYTES + 5))
    with Front(rgw_server.port).running() as front:
        options = ["--endpoint-url", front.url, "--immutable", "--refresh", "1s"]
        mount = mounted(bucket, *options, prefix="p/")
        assert (mount.path / "f").read_bytes() == data
        mount.wait_complete()
        bucket.put("p/later", b"x")
        time.sleep(2.5)
        assert os.listdir(mount.path) == ["f"]
        mount.kill_worker()
        assert os.listdir(mount.path) == ["f"]
        mount.stop()
        front.down = True
        again = mounted(bucket, *options, prefix="p/")
        assert (again.path / "f").read_bytes() == data
        assert "mounting what was listed before" in again.log
        again.stop()
        front.down = False
        later = mounted(bucket, *options, prefix="p/")
        assert sorted(os.listdir(later.path)) == ["f", "later"]


def test_interrupted_reader_dies_at_once(bucket, mounted, rgw_server):
    """SIGKILL of a process that waits for bytes that do not come."""
    bucket.put("p/f", some_bytes(CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="p/")
    gateway = int((rgw_server.home / "client.rgw.pid").read_text())
    os.kill(gateway, 19)
    try:
        reader = subprocess.Popen(["cat", str(mount.path / "f")], stdout=subprocess.DEVNULL)
        time.sleep(0.5)
        assert reader.poll() is None
        reader.kill()
        assert reader.wait(3) == -9
        began = time.monotonic()
        assert mount.stop() == 0
        assert time.monotonic() - began < 5
    finally:
        os.kill(gateway, 18)


def test_commands(bucket, mounted):
    bucket.put("m/config.json", b"{}")
    bucket.put("m/model.safetensors", some_bytes(2 * CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="m/")
    warmed = run("warm", str(mount.path / "model.safetensors"))
    assert warmed.returncode == 0, warmed.stderr
    assert "16.0 MiB of 16.0 MiB" in warmed.stderr
    assert run("warm", str(mount.path / "nothing")).returncode == 3
    assert run("wait", str(mount.path / "nothing"), "--timeout", "5s").returncode == 3
    document = json.loads(run("status", str(mount.path), "--json").stdout)
    assert document["sources"][0]["resident"] == 2 * CHUNK_BYTES
    shown = run("status").stdout
    assert str(mount.path) in shown
    assert "passthrough on" in shown
    descriptor = os.open(mount.path / "config.json", os.O_RDONLY)
    busy = run("umount", str(mount.path))
    assert (busy.returncode, "busy" in busy.stderr) == (6, True)
    os.close(descriptor)
    assert run("umount", str(mount.path)).returncode == 0
    assert run("umount", str(mount.path)).returncode == 6


def test_background_mount_and_helper_return_when_it_answers(bucket, tmp_path):
    data = bucket.put("p/f", b"data")
    env = {**os.environ, **bucket.store.environment()}
    point = tmp_path / "mnt"
    point.mkdir()
    common = ["cache-size=1GiB", "min-free=1MiB", "admin=off", f"cache-dir={tmp_path / 'cache'}"]
    flags = [word for item in common for word in ("--" + item.partition("=")[0], item.partition("=")[2])]
    assert run("mount", bucket.uri("p/"), str(point), "--background", *flags, env=env).returncode == 0
    assert (point / "f").read_bytes() == data
    assert run("umount", str(point)).returncode == 0
    helper = Path(sys.executable).parent / "mount.modelfs"
    options = ",".join([*common, "_netdev", "x-systemd.automount", "nofail", "allow-other"])
    done = subprocess.run(
        [str(helper), bucket.uri("p/"), str(point), "-n", "-o", options],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (point / "f").read_bytes() == data
    assert "allow_other" in subprocess.check_output(["findmnt", "-no", "OPTIONS", str(point)], text=True)
    assert run("umount", str(point)).returncode == 0
    bad = subprocess.run(
        [str(helper), bucket.uri("p/"), str(point), "-o", "nonsense"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (bad.returncode, "unknown mount option 'nonsense'" in bad.stderr) == (2, True)


def test_systemd_is_told_when_the_mount_answers(bucket, tmp_path, mounted):
    bucket.put("p/f", b"data")
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        receiver.settimeout(20)
        os.environ["NOTIFY_SOCKET"] = str(address)
        try:
            mount = mounted(bucket, prefix="p/")
        finally:
            del os.environ["NOTIFY_SOCKET"]
        assert b"READY=1" in receiver.recv(1000)
        assert (mount.path / "f").read_bytes() == b"data"


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_admin_pages(bucket, mounted):
    bucket.put("m/model.safetensors", some_bytes(2 * CHUNK_BYTES))
    bucket.put("m/secret-name.bin", b"x")
    port = free_port()
    mount = mounted(bucket, "--admin", f"127.0.0.1:{port}", prefix="m/")
    base = f"http://127.0.0.1:{port}"
    mount.wait_complete()
    drop_pages(mount.path / "model.safetensors")
    assert get(f"{base}/healthz")[0] == 200
    assert get(f"{base}/readyz")[0] == 200
    code, body = get(f"{base}/readyz?path=model.safetensors&min=1")
    assert (code, json.loads(body)["complete"]) == (200, True)
    assert get(f"{base}/readyz?path=secret-name.bin&min=0.5&all=1")[0] == 503
    assert get(f"{base}/readyz?path=nothing")[0] == 404
    assert get(f"{base}/readyz?min=x")[0] == 400
    assert get(f"{base}/nothing")[0] == 404
    status = json.loads(get(f"{base}/v1/status")[1])
    assert status["sources"][0]["size"] == 2 * CHUNK_BYTES + 1
    metrics = get(f"{base}/metrics")[1]
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values['modelfs_origin_bytes_total{scheme="s3"}']) == 2 * CHUNK_BYTES
    for secret in ("secret-name", bucket.name, bucket.store.secret_key, bucket.store.access_key):
        assert secret not in metrics
    request = urllib.request.Request(f"{base}/v1/warm", data=b'{"paths": [""]}')
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=5)
    assert caught.value.code == 403
    caught.value.close()
    assert ask(mount.mount, "POST", "/v1/nonsense", {})[0] == 404


def test_control_socket_survives_garbage(bucket, mounted):
    bucket.put("p/f", b"data")
    mount = mounted(bucket, prefix="p/")
    path = control_socket(str(mount.path))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(mount.cache.stat().st_mode) == 0o700
    rng = random.Random(3)
    for length in (0, 1, 10, 1000, 70000):
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(path)
            client.sendall(rng.randbytes(length))
            client.shutdown(socket.SHUT_WR)
            client.settimeout(5)
            client.recv(100)
    for body in (b"[]", b"{", b'{"paths": 3}', b'{"paths": [1]}'):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"POST /v1/warm HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            assert client.recv(20).split()[1] in {b"400", b"404"}
    assert mount.status()["worker_starts"] == 1


def test_dead_mount_is_cleared_away(bucket, mounted, tmp_path):
    """A mount whose daemons were both killed answers ENOTCONN; mounting there again just works."""
    data = bucket.put("p/f", b"data")
    mount = mounted(bucket, prefix="p/")
    worker = mount.worker_pid()
    mount._process.kill()
    mount._process.wait()
    os.kill(worker, 9)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.statvfs(mount.path)
            time.sleep(0.05)
            continue
        break
    again = mounted(bucket, prefix="p/")
    assert (again.path / "f").read_bytes() == data
    assert "clearing the dead mount" in again.log


def test_mlocked_pages_survive_unmount_of_a_passed_through_file(bucket, mounted):
    """A mapping of a complete file needs the daemon no more."""
    data = bucket.put("m/model.safetensors", some_bytes(2 * CHUNK_BYTES))
    mount = mounted(bucket, prefix="m/")
    mount.wait_complete()
    with (mount.path / "model.safetensors").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mount.stop()
    assert mapped[:] == data
    mapped.close()


def test_processes_download_and_die_without_a_byte_wrong(bucket, mounted):
    data = bucket.put("p/model.bin", os.urandom(12 * CHUNK_BYTES + 5))
    mount = mounted(bucket, "--processes", "2", "--prefetch", "off", prefix="p/")

    def downloading():
        tasks = Path(f"/proc/{mount.worker_pid()}/task").iterdir()
        return [pid for task in tasks for pid in (task / "children").read_text().split()]

    first = downloading()
    assert len(first) == 2
    found = bytearray()
    with (mount.path / "model.bin").open("rb", buffering=0) as file:
        while piece := file.read(CHUNK_BYTES // 2):
            found += piece
            if len(found) == CHUNK_BYTES:  # the read-ahead is short yet
                for pid in downloading():
                    os.kill(int(pid), signal.SIGKILL)
    assert found == data
    assert not set(first) & set(downloading())
    last = downloading()
    mount.kill_worker()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in last) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in last)
    assert (mount.path / "model.bin").read_bytes() == data
