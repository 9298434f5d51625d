"""Credentials appear nowhere but where the SDK reads them."""

import os
import subprocess
from pathlib import Path

import pytest

from modelfs.chunks import CHUNK_BYTES
from modelfs.cli.client import request
from tests.faults import front as faults
from tests.faults.front import always, first
from tests.support.mounting import PROGRAM, run

TOKEN = "CANARY-session-token"


def processes_of(pid):
    """The command lines of a process and all below it."""
    found = [Path(f"/proc/{pid}/cmdline").read_bytes()]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += processes_of(int(child))
    return found


@pytest.mark.parametrize("processes", ["0", "2"])
def test_no_secret_in_logs_pages_arguments_files_or_errors(ministack_store, new_bucket, mounted, tmp_path, processes):
    bucket = new_bucket(ministack_store)
    bucket.put("m/good.bin", b"g" * CHUNK_BYTES)
    bucket.put("m/bad.bin", b"b" * CHUNK_BYTES)
    port = int(ministack_store.endpoint_url.rpartition(":")[2])
    with faults.Front(port).running() as front:
        options = ["--endpoint-url", front.url, "--log-level", "debug", "--processes", processes, "--prefetch", "off"]
        mount = mounted(bucket, *options, prefix="m/")
        front.faults = first(2, faults.refuse(500, "InternalError"))
        assert (mount.path / "good.bin").read_bytes() == b"g" * CHUNK_BYTES
        front.faults = always(faults.refuse(403, "SignatureDoesNotMatch"))
        with pytest.raises(PermissionError):
            (mount.path / "bad.bin").read_bytes()
        run("verify", str(mount.path))
        texts = {target: request(mount.mount, "GET", target)[1] for target in ("/metrics", "/v1/status", "/readyz")}
        texts["command lines"] = b"\n".join(processes_of(mount._process.pid))
        os.kill(mount.worker_pid(), 6)  # the watchdog's way: stacks are dumped
        assert run("wait", str(mount.path), "--timeout", "20s").returncode == 0
        for command in (["status"], ["status", "--json"], ["why", str(mount.path)], ["doctor", bucket.uri("m/")]):
            environment = {**mount.environment, "AWS_ENDPOINT_URL": front.url}
            done = subprocess.run([*PROGRAM, *command], env=environment, capture_output=True, check=False)
            texts[" ".join(command)] = done.stdout + done.stderr
        assert mount.stop() == 0
    texts["log"] = mount.log.encode()
    assert b"was denied" in texts["log"]
    for path in mount.cache.rglob("*"):
        if path.is_file():
            texts[str(path)] = path.read_bytes()
    wrong = {**mount.environment, "AWS_SECRET_ACCESS_KEY": TOKEN, "AWS_SESSION_TOKEN": TOKEN}
    done = run("mount", bucket.uri("m/"), str(tmp_path / "mnt"), "--cache-dir", str(tmp_path / "c2"), env=wrong)
    assert done.returncode == 4
    texts["a refused mount"] = (done.stdout + done.stderr).encode()
    for where, text in texts.items():
        for secret in (ministack_store.secret_key, TOKEN, "AWS4-HMAC", "Signature="):
            assert secret.encode() not in text, where
        if where != "log":
            assert ministack_store.access_key.encode() not in text, where
