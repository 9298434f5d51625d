"""The object store fails; a reader gets the right bytes, or the documented error, within the documented time."""

import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelfs.chunks import CHUNK_BYTES
from tests.conftest import Bucket
from tests.faults import front as faults
from tests.faults.front import Exchange, Fault, Front, always, first
from tests.support.mounting import Mounted
from tests.support.rgw import Rgw

DATA = random.Random(4).randbytes(2 * CHUNK_BYTES + 5)


def error_metric(kind: str) -> str:
    return f'modelfs_origin_errors_total{{kind="{kind}"}}'


TRANSIENT, THROTTLED, DENIED = error_metric("TransientOrigin"), error_metric("Throttled"), error_metric("AccessDenied")
CHANGED = error_metric("ObjectChanged")
LATE = (TRANSIENT, "modelfs_fetch_hedged_total")
"""A first byte that is late is asked for once more, when it is known how long first bytes take."""


@dataclass(frozen=True)
class Row:
    """A fault, its metric, what the reader sees (``None``: the right bytes), and within how many seconds."""

    name: str
    faults: Callable[[Exchange], Fault | None]
    metric: str | tuple[str, str]
    code: int | None = None
    seconds: float = 8
    log: str = ""
    hurried: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of these at least one counts the fault."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric


ROWS = [
    Row("503 SlowDown, five times", first(5, faults.refuse(503, "SlowDown")), THROTTLED),
    Row("429, three times", first(3, faults.refuse(429, "TooManyRequests")), THROTTLED),
    Row("500, three times", first(3, faults.refuse(500, "InternalError")), TRANSIENT),
    Row("403 once: credentials that have just expired", first(1, faults.refuse(403, "ExpiredToken")), DENIED),
    Row("403 for good", always(faults.refuse(403, "AccessDenied")), DENIED, errno.EACCES, 5, log="was denied"),
    Row("404 for good", always(faults.refuse(404, "NoSuchKey")), error_metric("ObjectNotFound"), errno.ENOENT, 5,
        log="does not exist any more"),
    Row("connection reset before the body, three times", first(3, faults.reset(0)), TRANSIENT),
    Row("connection reset in the body, five times", first(5, faults.reset(300_000)), "modelfs_origin_resumes_total"),
    Row("body cut short, five times", first(5, faults.cut(300_000)), "modelfs_origin_resumes_total"),
    Row("one byte per second from the first on, once", first(1, faults.trickle(0)), LATE, None, 25),
    Row("one byte per second in the middle, once", first(1, faults.trickle(1_000_000)), TRANSIENT, None, 25,
        log="no progress"),
    Row("one byte per second for good", always(faults.trickle(0)), "modelfs_fuse_errors_total", errno.EIO, 10,
        "a read failed: no progress", hurried=True),
    Row("silence after the head, once", first(1, faults.hang(0)), LATE, None, 25),
    Row("silence in the body, once", first(1, faults.hang(1_000_000)), TRANSIENT, None, 25),
    Row("no answer, once", first(1, faults.swallow), LATE, None, 25),
    Row("no answer for good", always(faults.swallow), "modelfs_fuse_errors_total", errno.EIO, 10,
        "a read failed", hurried=True),
    Row("wrong Content-Range, twice", first(2, faults.wrong_range), TRANSIENT),
    Row("200 with the whole object, twice", first(2, faults.whole(DATA)), TRANSIENT),
    Row("200 with the whole object for good", always(faults.whole(DATA)), TRANSIENT, errno.EIO, 10,
        "a read failed", hurried=True),
    Row("body too short by 7, twice", first(2, faults.wrong_length(-7)), TRANSIENT),
    Row("body too long by 7, twice", first(2, faults.wrong_length(7)), TRANSIENT),
    Row("redirect to nowhere, once", first(1, faults.redirect), TRANSIENT),
    Row("another version, If-Match ignored", always(faults.other_version), CHANGED, errno.ESTALE, 5,
        log="was overwritten"),
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A mount whose store is behind the front; every row reads a file of its own."""

    mount: Mounted
    front: Front


def settings(rgw_server: Rgw, root: Path, *options: str) -> Iterator[Setting]:
    bucket = Bucket(rgw_server.store)
    for number in range(len(ROWS)):
        bucket.put(f"m/{number}.bin", DATA)
    with Front(rgw_server.port).running() as front:
        options = ("--endpoint-url", front.url, "--prefetch", "off", *options)
        with Mounted(bucket.store, [bucket.uri("m/")], root, *options) as mount:
            yield Setting(mount, front)
    bucket.client.close()


@pytest.fixture(scope="module")
def patient(rgw_server, tmp_path_factory):
    yield from settings(rgw_server, tmp_path_factory.mktemp("patient"))


@pytest.fixture(scope="module")
def hurried(rgw_server, tmp_path_factory):
    yield from settings(rgw_server, tmp_path_factory.mktemp("hurried"), "--read-timeout", "6s")


GROUPS = [[row] for row in ROWS if row.seconds < 10] + [
    [row for row in ROWS if row.seconds >= 10 and row.hurried is hurried] for hurried in (False, True)
]
"""Rows that take long are tried at the same time, each on a file of its own."""


@pytest.mark.parametrize("group", GROUPS, ids=[", ".join(row.name for row in group) for group in GROUPS])
def test_fault(group, request, table):
    setting: Setting = request.getfixturevalue("hurried" if group[0].hurried else "patient")
    mount, front = setting.mount, setting.front
    time.sleep(1.1)  # a session younger than a second is not renewed
    log_before, before = len(mount.log), {metric: counted(mount, metric) for row in group for metric in row.metrics}
    front.gets.clear()
    front.injected = 0
    chosen = {f"/{ROWS.index(row)}.bin": row.faults for row in group}
    front.faults = lambda exchange: next(
        (choose(exchange) for end, choose in chosen.items() if exchange.target.partition("?")[0].endswith(end)), None
    )
    with ThreadPoolExecutor(len(group)) as pool:
        seconds = list(pool.map(lambda row: try_row(row, mount), group))
    assert front.injected >= len(group)
    for row, taken in zip(group, seconds, strict=True):
        assert taken < row.seconds, row.name
        grown = [metric for metric in row.metrics if counted(mount, metric) > before[metric]]
        assert grown, row.name
        assert row.log in mount.log[log_before:], row.name
        table.compared += len(DATA) if row.code is None else 0
        outcome = "the right bytes" if row.code is None else errno.errorcode[row.code]
        table.add(row.name, outcome, taken, ", ".join(grown))
    assert "Traceback" not in mount.log
    table.injected += front.injected


def try_row(row, mount):
    """Read the row's file through; return how long it took."""
    descriptor = os.open(mount.path / f"{ROWS.index(row)}.bin", os.O_RDONLY)
    began = time.monotonic()
    try:
        if row.code is None:
            assert read_all(descriptor) == DATA, row.name
        else:
            with pytest.raises(OSError, match=re.escape(os.strerror(row.code))):
                read_all(descriptor)
    finally:
        os.close(descriptor)
    return time.monotonic() - began


def counted(mount: Mounted, metric: str) -> float:
    return sum(value for name, value in mount.metrics().items() if name.startswith(metric))


def read_all(descriptor: int) -> bytes:
    found = bytearray()
    while piece := os.read(descriptor, 1 << 20):
        found += piece
    return bytes(found)


def test_storm_of_everything_under_many_readers(bucket, mounted, front, table):
    """Half of all requests fail, in every way that passes."""
    contents = {name: random.Random(name).randbytes(5 * CHUNK_BYTES + 11) for name in ("a.bin", "b.bin", "c.bin")}
    for name, data in contents.items():
        bucket.put(f"m/{name}", data)
    mount = mounted(bucket, "--endpoint-url", front.url, "--prefetch", "off", prefix="m/")
    front.faults = faults.storm(
        0.5, faults.refuse(503, "SlowDown"), faults.reset(100_000), faults.cut(2_000_000), faults.wrong_range,
        faults.refuse(500, "InternalError"), faults.wrong_length(-3), faults.reset(0),
    )  # fmt: skip
    failures = []

    def read(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(30):
            name = generator.choice(sorted(contents))
            start = generator.randrange(len(contents[name]))
            size = generator.randrange(1, 3 << 20)
            with (mount.path / name).open("rb", buffering=0) as file:
                if os.pread(file.fileno(), size, start) != contents[name][start : start + size]:
                    failures.append((name, start, size))
            table.compared += min(size, len(contents[name]) - start)

    began = time.monotonic()
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    for name, data in contents.items():
        assert (mount.path / name).read_bytes() == data
        table.compared += len(data)
    assert front.injected >= 8
    table.injected += front.injected
    table.add("half of all requests fail, 8 readers", "the right bytes", time.monotonic() - began, TRANSIENT)


@pytest.mark.parametrize("gone", [5, pytest.param(30, marks=pytest.mark.nightly)])
def test_store_gone_and_back(bucket, mounted, front, table, gone):
    """Readers wait, and go on soon after it is back; so does the download ahead of them."""
    data = random.Random(9).randbytes(6 * CHUNK_BYTES)
    bucket.put("m/model.bin", data)
    mount = mounted(bucket, "--endpoint-url", front.url, "--prefetch", "off", prefix="m/")
    with (mount.path / "model.bin").open("rb", buffering=0) as file:
        assert file.read(1000) == data[:1000]
        front.down = True
        back: list[float] = []

        def come_back() -> None:
            front.down = False
            back.append(time.monotonic())

        timer = threading.Timer(gone, come_back)
        timer.start()
        found = os.pread(file.fileno(), 1000, 5 * CHUNK_BYTES)
        recovered = time.monotonic()
        timer.join()
    assert found == data[5 * CHUNK_BYTES :][:1000]
    assert recovered - back[0] < 10
    assert (mount.path / "model.bin").read_bytes() == data
    table.compared += len(data)
    table.add(
        f"store gone for {gone} s", "waits, then the right bytes", recovered - back[0], error_metric("EndpointUnre…")
    )


def test_unmount_while_readers_wait_for_a_store_that_is_silent(bucket, mounted, front, table):
    bucket.put("m/model.bin", DATA)
    mount = mounted(bucket, "--endpoint-url", front.url, "--prefetch", "off", prefix="m/")
    front.faults = always(faults.swallow)
    outcomes: list[object] = []

    def read() -> None:
        try:
            outcomes.append((mount.path / "model.bin").read_bytes())
        except OSError as error:
            outcomes.append(error.errno)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert faults.wait_for(lambda: front.injected > 0, 10)
    time.sleep(0.5)
    began = time.monotonic()
    assert mount.stop() == 0
    seconds = time.monotonic() - began
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert all(isinstance(outcome, int) for outcome in outcomes), "an error, never a byte"
    assert seconds < 5
    table.injected += front.injected
    table.add("unmount while the store is silent and 8 readers wait", "an error", seconds, "")
