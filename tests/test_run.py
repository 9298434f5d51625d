"""``modelfs run``, ``modelfs why``, traces and the page cache, on real mounts."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from modelfs.chunks import CHUNK_BYTES
from modelfs.cli.embedded import ObjectStore
from modelfs.fuse.tuning import mount_at
from tests.support.mounting import PROGRAM, Mounted, run
from tests.support.pages import cached_bytes
from tests.support.slow_proxy import slow_proxy

pytestmark = pytest.mark.fuse


def words(bucket, tmp_path, *command, source="p/", options=()):
    (tmp_path / "mnt").mkdir(exist_ok=True)
    places = [bucket.uri(source), str(tmp_path / "mnt"), "--cache-dir", str(tmp_path / "cache")]
    return ["run", *places, "--admin", "off", "--log-level", "warning", *options, "--", *command]


def beside(bucket, tmp_path, *command, **more):
    env = {**os.environ, **bucket.store.environment()}
    done = run(*words(bucket, tmp_path, *command, **more), env=env)
    assert not mount_at(str(tmp_path / "mnt"))
    return done


def test_command_reads_the_bucket_and_its_status_is_returned(bucket, tmp_path):
    bucket.put("p/file", b"the bytes\n")
    done = beside(bucket, tmp_path, "sh", "-c", f"cat {tmp_path}/mnt/file; exit 7")
    assert (done.stdout, done.returncode, done.stderr) == ("the bytes\n", 7, "")


def test_command_starts_before_the_daemon_is_ready(bucket, tmp_path):
    bucket.put("p/file", b"x")
    script = f"import time,os; a=time.monotonic(); os.stat('{tmp_path}/mnt/file'); print(time.monotonic()-a)"
    done = beside(bucket, tmp_path, sys.executable, "-c", script)
    assert float(done.stdout) > 0.05  # it waited for a worker that was still importing


def test_command_killed_by_a_signal(bucket, tmp_path):
    bucket.put("p/file", b"x")
    assert beside(bucket, tmp_path, "sh", "-c", "kill -9 $$").returncode == 128 + 9


def test_missing_bucket_ends_the_command(bucket, tmp_path):
    began = time.monotonic()
    done = beside(bucket, tmp_path, "sleep", "60", source="none/")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "there is no object under" in done.stderr
    assert time.monotonic() - began < 30


def test_what_cannot_be_run_is_said_in_one_line(bucket, tmp_path):
    for command, text in ((("no-such-program",), "cannot be found"), ((), "no command to run")):
        done = beside(bucket, tmp_path, *command)
        assert (done.returncode, text in done.stderr, done.stderr.count("\n")) == (2, True, 1)


def test_a_signal_is_passed_on(bucket, tmp_path):
    bucket.put("p/file", b"x")
    ready = tmp_path / "ready"
    script = f"trap 'exit 5' TERM; cat {tmp_path}/mnt/file; touch {ready}; while :; do sleep 0.05; done"
    command = [*PROGRAM, *words(bucket, tmp_path, "sh", "-c", script)]
    process = subprocess.Popen(command, env={**os.environ, **bucket.store.environment()}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 5
    assert not mount_at(str(tmp_path / "mnt"))


def test_a_complete_model_goes_into_the_page_cache(bucket, mounted):
    data = bucket.put("p/model.safetensors", os.urandom(3 * CHUNK_BYTES))
    mount = mounted(bucket, prefix="p/")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and cached_bytes(list((mount.cache / "data").iterdir())) < len(data):
        time.sleep(0.1)
    assert cached_bytes(list((mount.cache / "data").iterdir())) >= len(data)
    assert (mount.path / "model.safetensors").read_bytes() == data


def read_backwards(directory):
    for path in sorted(directory.glob("*.safetensors"), reverse=True):
        with path.open("rb") as file:
            while file.read(CHUNK_BYTES // 8):
                pass


def inner_downloads(requests):
    """Return the names of the files in the order of their GETs, without those for the first chunk and the last."""
    found = []
    for head in requests:
        if got := re.match(rb"GET /[^ ]*/(model-\d\.safetensors) .*\r\n[Rr]ange: bytes=(\d+)-", head, re.DOTALL):
            name, start = got[1].decode(), int(got[2])
            if 0 < start < 7 * CHUNK_BYTES:
                found.append(name)
    return found


def test_the_order_of_a_slow_load_is_kept_explained_and_replayed(bucket, tmp_path):
    size = 8 * CHUNK_BYTES
    for number in range(3):
        bucket.put(f"p/model-{number}.safetensors", os.urandom(size))
    options = ["--trace-uri", bucket.uri("traces/")]
    port = int(bucket.store.endpoint_url.rpartition(":")[2])
    requests: list[bytes] = []
    with slow_proxy(port, 48 * 1024 * 1024, requests=requests) as url:
        slow = ObjectStore(url, bucket.store.access_key, bucket.store.secret_key)
        nodes = [tmp_path / "first", tmp_path / "second"]
        for node in nodes:
            node.mkdir()
        with Mounted(slow, [bucket.uri("p/")], nodes[0], *options) as mount:
            read_backwards(mount.path)
            done = run("why", str(mount.path))
            assert done.returncode == 0
            assert "waiting for the bucket" in done.stdout
        assert "kept the order of this load" in mount.log
        (listed,) = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix="traces/")["Contents"]
        assert listed["Key"].endswith(".trace.json")
        requests.clear()
        with Mounted(slow, [bucket.uri("p/")], nodes[1], *options) as mount:
            mount.wait_complete()
        assert "in the order of an earlier load" in mount.log
        order = inner_downloads(requests)  # those that begin at once come in any order
        assert len(order) - 1 - order[::-1].index("model-2.safetensors") < order.index("model-0.safetensors")


def test_why_before_any_load(bucket, mounted):
    bucket.put("p/model.safetensors", b"x" * 100)
    mount = mounted(bucket, prefix="p/")
    done = run("why", str(mount.path))
    assert (done.returncode, done.stderr.count("\n"), "has been loaded yet" in done.stderr) == (3, 1, True)
