"""The processes that download, as the worker sees them."""

import contextlib
import os
import signal
import sys
import threading
import time

import pytest

from modelfs.chunks import CHUNK_BYTES, MIB, ByteRange, ObjectId, ObjectInfo
from modelfs.config import OriginConfig
from modelfs.errors import (
    BucketNotFoundError,
    ConfigError,
    ModelfsError,
    ObjectChangedError,
    OriginError,
    TransientOriginError,
)
from modelfs.memory import Memory
from modelfs.metrics import Metrics
from modelfs.origins.remote import PROGRAM, Processes, RemoteOrigin
from tests.support.slow_proxy import slow_proxy

PLACE_BYTES = 64 * 1024


class Sink:
    """Keeps the bytes; ``limit`` is how many it takes before it wants no more."""

    def __init__(self, memory, limit=1 << 40):
        self.data = bytearray()
        self.abort = None
        self.arrived = threading.Event()
        self._buffer = memory.view(PLACE_BYTES, 2 * PLACE_BYTES)  # not where the region begins
        self._limit = limit

    def space(self):
        if len(self.data) >= self._limit:
            raise KeyError("enough")
        return self._buffer

    def advance(self, count):
        self.data += self._buffer[:count]
        self.arrived.set()

    def connected(self, abort):
        self.abort = abort


@contextlib.contextmanager
def started(program=PROGRAM, level="warning"):
    memory = Memory.share()
    memory.reserve(CHUNK_BYTES)
    made = Processes(memory=memory, count=2, calls=4, logging=(level, "text"), program=program)
    try:
        yield made
    finally:
        pids = made.pids
        made.stop()
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.fixture
def environment(rgw_server, monkeypatch):
    for name, value in rgw_server.store.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def processes(environment):
    with started() as made:
        yield made


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def origin(bucket, processes, metrics):
    def make(name=bucket.name, **config):
        return RemoteOrigin(
            place=f"s3://{name}", config=OriginConfig(**config), processes=processes, count=metrics.origin_counter("s3")
        )

    return make


def sole(origin):
    (info,) = origin.list("")
    return info


def test_bytes_come_exactly_and_are_counted(bucket, origin, processes, metrics):
    data = bucket.put("k", os.urandom(3 * MIB + 7))
    made = origin()
    info = sole(made)
    assert info == ObjectInfo(ObjectId(made.name, "k", info.id.version), len(data), info.mtime_ns)
    for start, stop in [(0, len(data)), (1, 2), (PLACE_BYTES - 1, 3 * PLACE_BYTES + 1), (len(data) - 1, len(data))]:
        sink = Sink(processes.memory)
        made.read_into(info, ByteRange(start, stop), sink)
        assert sink.data == data[start:stop]
    assert metrics.registry.get_sample_value("modelfs_origin_requests_total", {"op": "get"}) == 4
    assert metrics.registry.get_sample_value("modelfs_origin_bytes_total", {"scheme": "s3"}) >= len(data)


def test_listing_comes_in_pages(bucket, origin):
    bucket.put_many(f"n/{number:04}" for number in range(1100))
    assert [info.id.key for info in origin().list("n/")] == [f"n/{number:04}" for number in range(1100)]


def test_small_objects(origin):
    made = origin()
    assert made.get_small("trace", 100) is None
    made.put_small("trace", b"text")
    assert made.get_small("trace", 100) == b"text"


def test_failures_keep_their_class_and_their_words(bucket, origin, processes):
    with pytest.raises(ConfigError, match="profile 'nobody'"):
        origin(profile="nobody")
    with pytest.raises(BucketNotFoundError, match="'no-such-bucket-1' does not exist"):
        list(origin("no-such-bucket-1").list(""))
    bucket.put("k", b"old version")
    made = origin()
    info = sole(made)
    bucket.put("k", b"new version")
    with pytest.raises(ObjectChangedError, match="overwritten"):
        made.read_into(info, ByteRange(0, 3), Sink(processes.memory))


def test_a_call_that_is_given_up_leaves_the_connection_usable(bucket, origin, processes):
    data = bucket.put("k", os.urandom(2 * MIB))
    made = origin()
    info = sole(made)
    for _ in range(2 * 4):  # more often than there are connections
        with pytest.raises(KeyError, match="enough"):
            made.read_into(info, ByteRange(0, len(data)), Sink(processes.memory, PLACE_BYTES))
    sink = Sink(processes.memory)
    made.read_into(info, ByteRange(0, len(data)), sink)
    assert sink.data == data


@pytest.fixture
def running(bucket, rgw_server, origin, processes):
    """A slow download that has begun, and what came of it."""
    data = bucket.put("k", os.urandom(4 * MIB))
    with slow_proxy(rgw_server.port, MIB) as url:
        made = origin(endpoint_url=url)
        info = sole(made)
        sink, outcome = Sink(processes.memory), []

        def read():
            try:
                made.read_into(info, ByteRange(0, info.size), sink)
            except ModelfsError as error:
                outcome.append(error)
            else:
                outcome.append(bytes(sink.data) == data)

        thread = threading.Thread(target=read)
        thread.start()
        assert sink.arrived.wait(20)
        yield made, sink, outcome, thread
        thread.join(30)


def test_a_broken_off_download_goes_on_where_it_was(running, processes):
    _, sink, outcome, thread = running
    before = processes.pids
    for _ in range(5):
        sink.abort()
    thread.join(30)
    assert outcome == [True]
    assert processes.pids == before


def test_a_killed_process_is_a_failure_to_be_tried_again_and_is_replaced(bucket, running, processes):
    made, _, outcome, thread = running
    before = processes.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    thread.join(30)
    assert [type(error) for error in outcome] == [TransientOriginError]
    assert made.get_small("k", 10)
    assert not set(before) & set(processes.pids)


def test_a_process_that_does_not_react_is_killed(running, processes, monkeypatch):
    monkeypatch.setattr("modelfs.origins.remote.REACTION_SECONDS", 0.1)
    _, sink, outcome, thread = running
    for pid in processes.pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        sink.abort()
        time.sleep(0.2)
        assert thread.is_alive()
        sink.abort()
        thread.join(30)
        assert [type(error) for error in outcome] == [TransientOriginError]
    finally:
        for pid in processes.pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "profile 'team'"),
        ("endpoint_url = http://127.0.0.1:9\n", "leads to s3://.*127.0.0.1:9 now"),
    ],
)
def test_a_configuration_that_changes_later_is_a_failure_to_be_tried_again(
    bucket, rgw_server, environment, metrics, tmp_path, monkeypatch, text, match
):
    """A process that is started later reads the configuration later."""
    file = tmp_path / "aws-config"
    store = rgw_server.store
    profile = f"[profile team]\naws_access_key_id = {store.access_key}\naws_secret_access_key = {store.secret_key}\n"
    right = f"{profile}endpoint_url = {store.endpoint_url}\n"
    file.write_text(right)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    bucket.put("k", b"data")
    config = OriginConfig(profile="team", addressing="path")
    with started() as processes:
        made = RemoteOrigin(
            place=f"s3://{bucket.name}", config=config, processes=processes, count=metrics.origin_counter("s3")
        )
        info, sink = sole(made), Sink(processes.memory)
        file.write_text(text and profile + text)
        for pid in processes.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(TransientOriginError, match=match):
            made.read_into(info, ByteRange(0, 4), sink)
        file.write_text(right)
        made.read_into(info, ByteRange(0, 4), sink)
    assert sink.data == b"data"


def test_what_nobody_foresaw_is_an_error_and_not_a_hang(environment, metrics):
    with started((sys.executable, "-m", "tests.support.odd_process"), "error") as processes:
        made = RemoteOrigin(
            place="s3://bucket", config=OriginConfig(), processes=processes, count=metrics.origin_counter("s3")
        )
        info = ObjectInfo(ObjectId(made.name, "k", "v"), 10, 0)
        for _ in range(4):  # as often as there are connections
            with pytest.raises(OriginError, match="KeyError"):
                made.list("n/")
            with pytest.raises(OriginError, match="odd"):
                made.read_into(info, ByteRange(0, 10), Sink(processes.memory))


def test_what_came_before_a_call_was_given_up_is_counted(bucket, origin, processes, metrics):
    data = bucket.put("k", os.urandom(2 * MIB))
    made = origin()
    with pytest.raises(KeyError, match="enough"):
        made.read_into(sole(made), ByteRange(0, len(data)), Sink(processes.memory, PLACE_BYTES))
    assert metrics.registry.get_sample_value("modelfs_origin_requests_total", {"op": "get"}) == 1
    assert metrics.registry.get_sample_value("modelfs_origin_bytes_total", {"scheme": "s3"}) >= PLACE_BYTES


def test_stopping_with_a_download_under_way_starts_nothing_anew(running, processes):
    _, _, outcome, thread = running
    processes.stop()
    thread.join(30)
    assert [type(error) for error in outcome] == [TransientOriginError]
    assert processes.pids == []
