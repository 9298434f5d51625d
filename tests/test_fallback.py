"""A second place behind a source: used where files are proved to be the same, and never otherwise."""

import hashlib
import os
import random
import time

import pytest

from modelfs.chunks import CHUNK_BYTES, ByteRange, ObjectId, ObjectInfo
from modelfs.errors import EndpointUnreachableError, ObjectChangedError, ObjectNotFoundError
from modelfs.origins.fallback import FallbackOrigin, Twins
from tests.faults.front import Front
from tests.support.hub import TOKEN, Hub
from tests.support.mounting import Mounted, run
from tests.test_origins import Collect

DATA = random.Random(8).randbytes(3 * CHUNK_BYTES + 17)


class Scripted:
    """An origin of one object that fails after so many bytes."""

    def __init__(self, name, data, failure=None, after=0):
        self.name, self.data, self.failure, self.after = name, data, failure, after
        self.asked = []

    def read_into(self, info, span, sink):
        self.asked.append(span)
        for position in range(span.start, span.stop):
            if self.failure is not None and position >= span.start + self.after:
                raise self.failure
            sink.space()[:1] = self.data[position : position + 1]
            sink.advance(1)


def info(origin, version="v"):
    return ObjectInfo(ObjectId(origin, "k", version), 10, 0)


def pair(failure, after=0, equal=True):
    first, second = Scripted("s3://b", b"0123456789", failure, after), Scripted("hf://o/n", b"0123456789")
    counts = []
    made = FallbackOrigin(first, counts.append)
    made.pair("source", Twins(second, {info("s3://b").number: info("hf://o/n")} if equal else {}))
    return made, first, second, counts


def read(origin):
    sink = Collect()
    origin.read_into(info("s3://b"), ByteRange(2, 9), sink)
    return bytes(sink.data)


def test_goes_on_at_the_byte_reached():
    made, _, second, counts = pair(ObjectNotFoundError("gone"), after=3)
    assert read(made) == b"2345678"
    assert second.asked == [ByteRange(5, 9)]
    assert counts == ["read"]


def test_a_place_that_is_down_is_left_alone_for_a_while(monkeypatch):
    made, first, _, counts = pair(EndpointUnreachableError("away"))
    assert read(made) == read(made) == b"2345678"
    assert len(first.asked) == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 31)
    assert read(made) == b"2345678"
    assert len(first.asked) == 2
    assert counts == ["read"] * 3


def test_what_is_not_proved_equal_is_not_read():
    made, _, second, counts = pair(ObjectNotFoundError("gone"), equal=False)
    with pytest.raises(ObjectNotFoundError):
        read(made)
    assert not second.asked
    assert counts == ["refused"]


def test_an_overwritten_object_has_no_second_place():
    made, _, second, _ = pair(ObjectChangedError("overwritten"))
    with pytest.raises(ObjectChangedError):
        read(made)
    assert not second.asked


# -- through the kernel -------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with Hub().running() as running:
        running.repository("org/model").gated = True
        yield running


@pytest.fixture
def front(rgw_server):
    with Front(rgw_server.port).running() as running:
        yield running


FILES = {"model-00001-of-00001.safetensors": DATA, "config.json": b'{"a": 1}'}


def sums(files):
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()


@pytest.fixture
def setting(bucket, hub, tmp_path):
    """Mount a bucket, its files listed in SHA256SUMS, with the Hub behind it."""
    hub.repository("org/model").commit(**FILES)
    made = []

    def mount(ours, more="", listed=None):
        for name, data in ours.items():
            bucket.put(f"m/{name}", data)
        if listed is not None:
            bucket.put("m/SHA256SUMS", sums(listed))
        file = tmp_path / "modelfs.toml"
        file.write_text(f'{more}[[sources]]\nuri = "{bucket.uri("m/")}"\norigin = "hf://org/model"\n')
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        options = ("--config", str(file), "--prefetch", "off", "--read-timeout", "10s")
        made.append(Mounted(bucket.store, [], tmp_path, *options, env=environment))
        return made[-1].__enter__()

    yield mount
    for mount in made:
        mount.stop()


def counted(mount, name):
    return sum(value for metric, value in mount.metrics().items() if metric.startswith(name))


@pytest.mark.fuse
def test_bucket_that_loses_a_file_while_it_is_open(setting, bucket):
    mount = setting(FILES, listed=FILES)
    path = mount.path / "model-00001-of-00001.safetensors"
    with path.open("rb", buffering=0) as file:
        assert file.read(100) == DATA[:100]
        bucket.client.delete_object(Bucket=bucket.name, Key="m/model-00001-of-00001.safetensors")
        found = bytearray()
        file.seek(0)
        while piece := file.read(1 << 20):
            found += piece
    assert found == DATA
    assert counted(mount, 'modelfs_fallback_runs_total{result="read"}') > 0
    assert counted(mount, 'modelfs_origin_bytes_total{scheme="hf"}') > 0
    assert "is read from hf://org/model" in mount.log


@pytest.mark.fuse
def test_file_that_only_the_second_place_has(setting):
    mount = setting({"config.json": FILES["config.json"]})
    assert (mount.path / "model-00001-of-00001.safetensors").read_bytes() == DATA
    assert counted(mount, 'modelfs_origin_bytes_total{scheme="hf"}') >= len(DATA)
    assert (mount.path / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.fuse
def test_other_bytes_of_the_same_size_are_refused(setting, bucket):
    ours = {"model-00001-of-00001.safetensors": DATA[::-1], "config.json": FILES["config.json"]}
    mount = setting(ours, listed=ours)
    assert counted(mount, 'modelfs_fallback_runs_total{result="refused"}') > 0
    assert "does not match m/SHA256SUMS" in mount.log
    path = mount.path / "model-00001-of-00001.safetensors"
    with path.open("rb", buffering=0) as file:
        assert file.read(100) == DATA[::-1][:100]
        bucket.client.delete_object(Bucket=bucket.name, Key="m/model-00001-of-00001.safetensors")
        file.seek(2 * CHUNK_BYTES)
        with pytest.raises(OSError, match="No such file|Stale"):
            file.read(100)
    deadline = time.monotonic() + 20  # a listing without the file: what the Hub has is not what was promised
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
        with pytest.raises(OSError, match="No such file|Stale"):
            path.read_bytes()
    assert counted(mount, 'modelfs_origin_bytes_total{scheme="hf"}') == 0


@pytest.mark.fuse
def test_listings_that_fail_leave_the_second_place_as_it_was(setting, front, hub):
    """While the first is down its listing fails again and again; what was known to be equal still is."""
    hub.repository("org/model").commit(**{"only-there.json": b"[]"})
    mount = setting(FILES, 'endpoint_url = "' + front.url + '"\nrefresh = 1\n', listed=FILES)
    path = mount.path / "model-00001-of-00001.safetensors"
    with path.open("rb", buffering=0) as file:
        assert file.read(100) == DATA[:100]
        before = path.stat().st_ino
        front.down = True
        deadline = time.monotonic() + 60
        while "has one place only now" not in mount.log and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        assert os.pread(file.fileno(), 1000, 2 * CHUNK_BYTES) == DATA[2 * CHUNK_BYTES :][:1000]
    assert path.stat().st_ino == before
    assert path.read_bytes() == DATA
    assert sorted(os.listdir(mount.path)) == sorted([*FILES, "SHA256SUMS", "only-there.json"])


@pytest.mark.fuse
def test_second_place_that_is_away_costs_nothing(setting, hub):
    hub.down = True
    mount = setting(FILES, listed=FILES)
    assert (mount.path / "config.json").read_bytes() == FILES["config.json"]
    assert "has one place only now" in mount.log


@pytest.mark.fuse
def test_first_place_that_is_away_at_the_mount(setting, bucket, hub, tmp_path):
    file = tmp_path / "modelfs.toml"
    file.write_text('[[sources]]\nuri = "s3://bucket/m/"\norigin = "hf://org/model"\n')
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    options = ("--config", str(file), "--endpoint-url", "http://127.0.0.1:1")
    with Mounted(bucket.store, [], tmp_path, *options, env=environment) as mount:
        assert (mount.path / "model-00001-of-00001.safetensors").read_bytes() == DATA


def test_doctor_and_mount_say_one_line_for_a_bad_table(tmp_path):
    file = tmp_path / "modelfs.toml"
    file.write_text('[[sources]]\nuri = "s3://bucket/m/"\norgin = "hf://org/model"\n')
    done = run("mount", "--config", str(file), str(tmp_path))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "did you mean 'origin'" in done.stderr
