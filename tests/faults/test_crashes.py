"""Processes and machines that stop in the middle: no wrong byte, no dead mount, and what was lost comes again."""

import contextlib
import os
import random
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

from modelfs.chunks import CHUNK_BYTES, MIB
from tests.support.differential import CAP_MIB, SIZES, Killer, compare, file_bytes
from tests.support.mounting import Mounted, run
from tests.support.slow_proxy import slow_proxy

WATCHDOG_SECONDS = 30


def test_the_mount_outlives_its_supervisor(bucket, mounted):
    data = bucket.put("m/model.bin", random.Random(1).randbytes(2 * CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="m/")
    mount._process.kill()
    mount._process.wait()
    assert (mount.path / "model.bin").read_bytes() == data
    assert run("umount", str(mount.path)).returncode == 0
    assert not mount.path.is_mount()


@pytest.mark.nightly
def test_a_cache_copied_in_the_middle_of_a_download_never_gives_a_wrong_byte(bucket, rgw_server, tmp_path):
    """What a machine's crash leaves is no worse than files that were copied one after the other while written."""
    data = bucket.put("m/model.safetensors", random.Random(2).randbytes(12 * CHUNK_BYTES + 9))
    copies = []
    with slow_proxy(rgw_server.port, 40 * MIB) as url:
        (tmp_path / "first").mkdir()
        with Mounted(bucket.store, [bucket.uri("m/")], tmp_path / "first", "--endpoint-url", url) as mount:
            for number in range(4):
                time.sleep(0.4)
                copies.append(tmp_path / f"copy-{number}")
                copies[-1].mkdir()
                shutil.copytree(mount.cache, copies[-1] / "cache", ignore=shutil.ignore_patterns("*.sock", "lock"))
    kept = []
    for root in copies:
        with Mounted(bucket.store, [bucket.uri("m/")], root, "--prefetch", "off") as mount:
            kept.append(mount.status()["cache"]["resident_bytes"])
            assert (mount.path / "model.safetensors").read_bytes() == data
            with (mount.path / "model.safetensors").open("rb") as file:
                assert file.read() == data
            assert "Traceback" not in mount.log
    assert any(kept), "none of the copies held a chunk: they show nothing"


@pytest.mark.nightly
def test_a_restarted_worker_evicts_nothing_that_is_open(bucket, mounted):
    """The kernel reads a complete file without us: punching it would give zeros."""
    data = bucket.put("a/model.safetensors", random.Random(5).randbytes(4 * CHUNK_BYTES))
    bucket.put("b/model.safetensors", random.Random(6).randbytes(24 * CHUNK_BYTES))
    mount = mounted(
        bucket, "--cache-size", "160MiB", "--min-free", "1MiB", "--max-memory", "32MiB", "--prefetch", "all"
    )
    mount.wait_complete("a")
    with (mount.path / "a/model.safetensors").open("rb", buffering=0) as file:
        files = mount.status()["sources"][0]["files"]
        assert [one.get("in_use") for one in files if one["path"].startswith("a/")] == ["passthrough"]
        for _ in range(2):
            mount.kill_worker()
            assert run("wait", str(mount.path), "--timeout", "20s").returncode == 0
            time.sleep(4)  # longer than the eviction's interval
            assert os.pread(file.fileno(), len(data), 0) == data


@contextlib.contextmanager
def memory_limit(pid, limit):
    """Put a process into a control group that may use so many bytes."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (old if old.is_dir() else new) / f"modelfs-test-{pid}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no memory control group can be made: {error}")
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def test_a_worker_that_runs_out_of_memory_is_replaced(bucket, mounted):
    data = bucket.put("m/model.bin", random.Random(8).randbytes(20 * CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="m/")
    pid = mount.worker_pid()
    with memory_limit(pid, 64 * MIB):
        assert (mount.path / "model.bin").read_bytes() == data
    assert mount.worker_pid() != pid
    assert "killed by SIGKILL" in mount.log
    assert "Traceback" not in mount.log


def test_index_on_a_disk_that_cannot_be_read_any_more(bucket, mounted):
    """It is a mapped file: a page that cannot be read ends the worker by SIGBUS, and would end the next one."""
    data = bucket.put("m/model.bin", random.Random(10).randbytes(3 * CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="m/")
    with (mount.path / "model.bin").open("rb", buffering=0) as file:
        assert file.read(1000) == data[:1000]
        os.kill(mount.worker_pid(), signal.SIGBUS)
        assert os.pread(file.fileno(), 1000, 2 * CHUNK_BYTES) == data[2 * CHUNK_BYTES :][:1000]
    assert (mount.path / "model.bin").read_bytes() == data
    assert "killed by SIGBUS" in mount.log
    assert "the mount goes on without its cache" in mount.log
    assert mount.status()["cache"]["skipped_chunks"]["disk_error"] > 0


@pytest.mark.parametrize("stop", ["record", "write"])
def test_killed_between_data_and_index(bucket, mounted, stop, tmp_path):
    """The worker ends right after the data is durable and before the index knows, or in the middle of the data."""
    data = bucket.put("m/model.bin", random.Random(9).randbytes(6 * CHUNK_BYTES + 5))
    mount = mounted(bucket, "--prefetch", "off", prefix="m/", env={"PYTHONPATH": str(dying_at(stop, tmp_path))})
    assert (mount.path / "model.bin").read_bytes() == data
    deadline = time.monotonic() + 20
    while "killed by SIGKILL" not in mount.log and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "killed by SIGKILL" in mount.log
    with (mount.path / "model.bin").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == data
    assert run("verify", str(mount.path)).returncode in {0, 9}
    assert "Traceback" not in mount.log


def dying_at(moment, directory):
    """Return a directory whose sitecustomize kills the first worker at that moment of its life."""
    target = {"record": ("modelfs.store.index", "Index.record"), "write": ("modelfs.store.files", "_write_direct")}[
        moment
    ]
    (directory / "site").mkdir()
    (directory / "site/sitecustomize.py").write_text(f"""
import importlib, os, signal, sys, threading, time
def arm():
    while {target[0]!r} not in sys.modules:
        time.sleep(0.01)
    time.sleep(0.3)
    owner, names = sys.modules[{target[0]!r}], {target[1]!r}.split(".")
    for name in names[:-1]:
        owner = getattr(owner, name)
    real = getattr(owner, names[-1])
    def die(*arguments):
        if {moment!r} == "write":
            path, data, offset = arguments
            real(path, data[: len(data) // 2 & ~4095], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, names[-1], die)
marker = {str(directory / "died")!r}
if "modelfs.worker" in " ".join(sys.orig_argv) and not os.path.exists(marker):
    open(marker, "w").close()
    threading.Thread(target=arm, daemon=True).start()
""")
    return directory / "site"


@pytest.mark.nightly
def test_a_stopped_worker_is_replaced_by_the_watchdog(bucket, mounted):
    data = bucket.put("m/model.bin", random.Random(3).randbytes(4 * CHUNK_BYTES))
    mount = mounted(bucket, "--prefetch", "off", prefix="m/")
    found = []
    os.kill(mount.worker_pid(), signal.SIGSTOP)
    began = time.monotonic()
    reader = threading.Thread(target=lambda: found.append((mount.path / "model.bin").read_bytes()))
    reader.start()
    reader.join(WATCHDOG_SECONDS + 15)
    assert found == [data]
    assert WATCHDOG_SECONDS - 5 < time.monotonic() - began < WATCHDOG_SECONDS + 10
    assert "no sign of life" in mount.log


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_two_hundred_kills_under_load(bucket, mounted, capsys):
    for number in range(len(SIZES)):
        bucket.put(f"p/f{number}", file_bytes(number))
    options = ["--cache-size", f"{CAP_MIB}MiB", "--min-free", "1MiB", "--max-memory", "32MiB", "--prefetch", "off"]
    mount = mounted(bucket, *options, prefix="p/")
    killer = Killer(mount, 200)
    killer.thread.start()
    outcome = compare(mount.path, 0, go_on=killer.thread.is_alive)
    killer.thread.join()
    with capsys.disabled():
        print(
            f"\n{len(killer.waits)} kills, {outcome.reads} reads, {outcome.bytes / 1e9:.1f} GB compared; from the kill "
            f"to the next answered read: median {statistics.median(killer.waits):.2f} s, most {max(killer.waits):.2f} s"
        )
    assert len(killer.waits) == 200
    assert not killer.errors
    assert not outcome.errors
    assert not outcome.wrong
