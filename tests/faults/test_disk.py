"""The cache disk is full, broken or slow: readers get the right bytes from memory, as fast as the store gives them."""

import os
import random
import time

import pytest

from modelfs.chunks import CHUNK_BYTES, MIB
from tests.faults.front import wait_for
from tests.support.disk import disk, memory_disk
from tests.support.mounting import Mounted, run

DATA = {f"{name}.bin": random.Random(name).randbytes(5 * CHUNK_BYTES + 3) for name in "abc"}
SIZE = sum(map(len, DATA.values()))
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="making a disk needs root and loop devices"
)


@pytest.fixture
def on_disk(bucket, tmp_path):
    """Mount the three files with the cache on a disk; unmount before the disk goes."""
    mounts = []

    def mount(cache_disk, *options, floor="1MiB"):
        for name, data in DATA.items():
            bucket.put(f"m/{name}", data)
        root = tmp_path / "mount"
        root.mkdir()
        options = ("--cache-dir", str(cache_disk.path / "cache"), "--cache-size", "1GiB", "--min-free", floor, *options)
        mounts.append(Mounted(bucket.store, [bucket.uri("m/")], root, "--prefetch", "off", *options))
        return mounts[-1].__enter__()

    yield mount
    for one in mounts:
        one.stop()


@pytest.fixture
def small_disk(tmp_path, request):
    with disk(tmp_path, getattr(request, "param", 96)) as made:
        yield made


@pytest.fixture
def stopped_first(small_disk, on_disk):
    """Mounts end before the disk does."""
    return small_disk, on_disk


def skipped(mount, *reasons):
    return sum(mount.metrics().get(f'modelfs_store_skipped_chunks_total{{reason="{one}"}}', 0) for one in reasons)


def read(mount, *names):
    """Read files through, twice around the page cache; return the seconds of the first time."""
    took = 0.0
    for name in names or DATA:
        began = time.monotonic()
        assert (mount.path / name).read_bytes() == DATA[name]
        took += time.monotonic() - began
        with (mount.path / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == DATA[name]
    return took


def told_by_doctor(mount, text):
    done = run("doctor", "--cache-dir", str(mount.cache))
    assert f"{mount.path}: " in done.stdout, done.stdout
    assert text in done.stdout, done.stdout


def noted(table, fault, seconds, metric):
    table.compared += 2 * SIZE
    table.injected += 1
    table.add(fault, "the right bytes", seconds, metric)


def test_another_process_fills_the_disk(stopped_first, table):
    cache_disk, on_disk = stopped_first
    mount = on_disk(cache_disk, floor="8MiB")
    read(mount)
    kept = mount.status()["cache"]["resident_bytes"]
    assert kept > 40 * MIB
    cache_disk.fill(leave=2 * MIB)
    began = time.monotonic()
    assert wait_for(lambda: cache_disk.free_bytes >= 8 * MIB, 15), "--min-free holds"
    seconds = time.monotonic() - began
    assert mount.status()["cache"]["resident_bytes"] < kept
    read(mount)
    assert wait_for(lambda: cache_disk.free_bytes >= 8 * MIB, 15)
    noted(table, "another process fills the cache disk: --min-free again after", seconds,
          'modelfs_store_evicted_bytes_total{reason="limit"}')  # fmt: skip


def test_a_full_disk(stopped_first, table):
    cache_disk, on_disk = stopped_first
    mount = on_disk(cache_disk)
    read(mount, "a.bin")
    time.sleep(1.5)  # recorded
    cache_disk.fill()
    seconds = read(mount)
    assert skipped(mount, "disk_full", "no_room") >= 1
    told_by_doctor(mount, "were served but not kept")
    mount.kill_worker()
    read(mount)
    assert "goes on without its cache" not in mount.log, "what is there can still be read"
    assert "Traceback" not in mount.log
    noted(table, "the cache disk is full", seconds, 'modelfs_store_skipped_chunks_total{reason="no_room"}')


def test_a_disk_without_inodes(stopped_first, table):
    cache_disk, on_disk = stopped_first
    mount = on_disk(cache_disk)
    cache_disk.fill_inodes()
    seconds = read(mount)
    assert skipped(mount, "disk_full") >= 10
    told_by_doctor(mount, "were served but not kept")
    assert "Traceback" not in mount.log
    noted(table, "the cache disk has no inodes", seconds, 'modelfs_store_skipped_chunks_total{reason="disk_full"}')


def test_a_disk_that_has_become_read_only(stopped_first, front, table):
    cache_disk, on_disk = stopped_first
    mount = on_disk(cache_disk, "--endpoint-url", front.url)
    read(mount, "a.bin")
    time.sleep(1.5)  # recorded
    cache_disk.abort()
    seconds = read(mount)
    assert skipped(mount, "disk_error") >= 10
    told_by_doctor(mount, "Read-only file system")
    assert "Traceback" not in mount.log
    assert len(mount.log.splitlines()) < 12, "no line per chunk"
    front.down = True
    mount.kill_worker()
    assert run("wait", str(mount.path), "--timeout", "20s").returncode == 0, "the listing is known"
    assert sorted(os.listdir(mount.path)) == sorted(DATA)
    front.down = False
    read(mount)
    told_by_doctor(mount, "Read-only file system")
    assert "the mount goes on without its cache" in mount.log
    noted(table, "the cache disk is read-only", seconds, 'modelfs_store_skipped_chunks_total{reason="disk_error"}')


@pytest.mark.parametrize("small_disk", [256], indirect=True)
def test_a_disk_that_cannot_be_read(stopped_first, table):
    cache_disk, on_disk = stopped_first
    mount = on_disk(cache_disk, "--max-memory", "32MiB")
    with (mount.path / "a.bin").open("rb") as file:  # opened incomplete: its reads come to us
        assert file.read() == DATA["a.bin"]
        time.sleep(1.5)
        read(mount, "b.bin", "c.bin")  # takes the buffers
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        drop_pages(cache_disk)
        os.truncate(cache_disk.image, 8 * MIB)
        began = time.monotonic()
        file.seek(0)
        assert file.read() == DATA["a.bin"]
        seconds = time.monotonic() - began
    assert mount.metrics()["modelfs_store_corrupt_chunks_total"] >= 1
    assert "Input/output error" in mount.log
    assert "Traceback" not in mount.log
    noted(table, "reads from the cache disk fail", seconds, "modelfs_store_corrupt_chunks_total")


def drop_pages(cache_disk):
    for path in (cache_disk.path / "cache/data").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_thin_disk_whose_pool_is_full(bucket, tmp_path, on_disk, table):
    """Free blocks by its own account, and none in truth."""
    with memory_disk(tmp_path / "pool", 24) as pool, disk(tmp_path, 96, images=pool) as cache_disk:
        mount = on_disk(cache_disk)
        seconds = read(mount)
        assert skipped(mount, "disk_full", "disk_error") >= 5
        told_by_doctor(mount, "were served but not kept")
        noted(
            table,
            "a thin cache disk without backing",
            seconds,
            'modelfs_store_skipped_chunks_total{reason="disk_full"}',
        )
        assert mount.stop() == 0


def test_a_slow_disk(stopped_first, table):
    cache_disk, on_disk = stopped_first
    mount = on_disk(cache_disk, "--max-memory", "64MiB")
    with cache_disk.slow(MIB):
        began = time.monotonic()
        for name, data in DATA.items():
            assert (mount.path / name).read_bytes() == data
        seconds = time.monotonic() - began
        assert skipped(mount, "slow_disk") >= 5
        told_by_doctor(mount, "were served but not kept")
    assert seconds < 20, "at a MiB/s the disk would take two minutes"
    noted(table, "the cache disk writes 1 MiB/s", seconds, 'modelfs_store_skipped_chunks_total{reason="slow_disk"}')
