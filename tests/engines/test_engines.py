"""Real engines produce from the mount, cold, exactly what they produce from local disk."""

import json
import os
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from modelfs.cli.embedded import ObjectStore, await_http, free_port
from tests.engines import ENVIRONMENT
from tests.support.mounting import Mounted
from tests.support.slow_proxy import slow_proxy

pytestmark = [pytest.mark.engines, pytest.mark.fuse, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
RATE = 12 * 1024 * 1024
"""Bytes per second: slow enough that the download outlasts the engine's imports."""


@pytest.fixture(scope="session")
def engine_python() -> str:
    python = os.environ.get("MODELFS_ENGINE_PYTHON")
    if not python:
        pytest.fail("run: make test-engines")
    return python


@pytest.fixture(scope="session")
def model(engine_python, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("model")
    subprocess.run([engine_python, str(HERE / "make_model.py"), str(target)], check=True, timeout=300)
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


@pytest.fixture
def slow_mount(model, bucket, rgw_server, tmp_path):
    """The model on a real server behind a slow network, mounted cold; also its first weight open."""
    for path in model.iterdir():
        bucket.client.upload_file(str(path), bucket.name, f"m/{path.name}")
    with slow_proxy(rgw_server.port, RATE) as url:
        store = ObjectStore(url, bucket.store.access_key, bucket.store.secret_key)
        with Mounted(store, [bucket.uri("m/")], tmp_path) as mount, Watch(mount) as watch:
            yield mount, watch


class Watch:
    """Looks at the mount's status until a weight file is open; keeps what was resident then."""

    def __init__(self, mount):
        self._mount = mount
        self._stop = threading.Event()
        self.at_first_open = None
        self._thread = threading.Thread(target=self._look)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _look(self):
        while not self._stop.wait(0.05):
            source = self._mount.status()["sources"][0]
            if any("in_use" in file and file["path"].endswith(".safetensors") for file in source["files"]):
                self.at_first_open = source["resident"], source["size"]
                return


def generate(engine_python, path, **environment) -> list[int]:
    done = subprocess.run(
        [engine_python, str(HERE / "generate.py"), str(path)],
        env={**os.environ, **ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_by_name_from_a_bucket(engine_python, model, bucket, tmp_path):
    """``from_pretrained("org/name")``, offline, from the Hub-shaped view of a bucket."""
    for path in model.iterdir():
        bucket.client.upload_file(str(path), bucket.name, f"models/org/name/{path.name}")
    with Mounted(bucket.store, [bucket.uri("models/")], tmp_path, "--layout", "hf") as mount:
        by_name = generate(engine_python, "org/name", HF_HUB_CACHE=str(mount.path), HF_HUB_OFFLINE="1")
    assert by_name == generate(engine_python, model)


def serve_and_complete(engine_python, path, log_path) -> dict:
    """Start vLLM's server on ``path``; return its completion at temperature 0 and the seconds to it."""
    port = free_port()
    command = [
        engine_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--host", "127.0.0.1",
        "--port", str(port), "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4",
    ]  # fmt: skip
    began = time.monotonic()
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            assert server.poll() is None, log_path.read_text()[-3000:]
            try:
                await_http(f"http://127.0.0.1:{port}/health", server)
                break
            except OSError:
                continue
            except Exception:  # noqa: BLE001 - not listening yet
                continue
        body = {"model": str(path), "prompt": "w7 w77 w777", "max_tokens": 12, "temperature": 0, "logprobs": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            choice = json.loads(answer.read())["choices"][0]
        return {"text": choice["text"], "tokens": choice["logprobs"]["tokens"], "seconds": time.monotonic() - began}
    finally:
        os.killpg(server.pid, 15)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


def complete_gguf(engine_python, path, how) -> str:
    done = subprocess.run(
        [engine_python, str(HERE / "generate_gguf.py"), str(path), how],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("how", ["mmap", "read"])
def test_llama_cpp(engine_python, bucket, tmp_path, how):
    local = tmp_path / "model.gguf"
    subprocess.run([engine_python, str(HERE / "make_gguf.py"), str(local)], check=True, timeout=300)
    bucket.client.upload_file(str(local), bucket.name, "m/model.gguf")
    with Mounted(bucket.store, [bucket.uri("m/")], tmp_path) as mount:
        text = complete_gguf(engine_python, mount.path / "model.gguf", how)
    assert text == complete_gguf(engine_python, local, how)
    assert text


def check_overlap(watch) -> None:
    assert watch.at_first_open is not None, "no weight file was seen open"
    resident, size = watch.at_first_open
    print(f"at the first open of a weight file {resident} of {size} bytes were local")
    assert 0 < resident < size


def test_transformers(engine_python, model, slow_mount):
    mount, watch = slow_mount
    assert generate(engine_python, mount.path) == generate(engine_python, model)
    check_overlap(watch)


def test_vllm(engine_python, model, slow_mount, tmp_path):
    mount, watch = slow_mount
    mounted = serve_and_complete(engine_python, mount.path, tmp_path / "vllm-mount.log")
    check_overlap(watch)
    local = serve_and_complete(engine_python, model, tmp_path / "vllm-local.log")
    print(f"seconds to the completion: cold mount {mounted['seconds']:.1f}, local {local['seconds']:.1f}")
    assert len(mounted["tokens"]) == 12
    assert (mounted["text"], mounted["tokens"]) == (local["text"], local["tokens"])
