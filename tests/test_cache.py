"""``ModelCache``, and the service that shows its use."""

import os
import random
import subprocess
import sys
import threading

import pytest
from fastapi.testclient import TestClient

from examples.fastapi_service import app
from modelfs import ModelCache
from modelfs.errors import ConfigError, ObjectNotFoundError
from tests.support.hub import Hub

DATA = random.Random(15).randbytes(100_000)


@pytest.fixture
def source(bucket, monkeypatch):
    for name, value in bucket.store.environment().items():
        monkeypatch.setenv(name, value)
    for version in ("v1", "v2"):
        bucket.put(f"llama/{version}/config.json", b"{}")
        bucket.put(f"llama/{version}/model.safetensors", DATA + version.encode())
    return bucket.uri() + "{name}/{version}/"


def test_get_stats_evict(source, tmp_path):
    models = ModelCache(tmp_path / "cache", source)
    path = models.get("llama", "v1")
    assert (path / "model.safetensors").read_bytes() == DATA + b"v1"
    assert models.get("llama", "v1") == models.get("llama", "v1", refresh=False) == path
    stats = models.stats()
    assert (stats.gets, stats.hits, stats.fetched_bytes) == (3, 2, len(DATA) + 4)
    assert [(one.name, one.version, one.files, one.size_bytes) for one in stats.models] == [
        ("llama", "v1", 2, len(DATA) + 4)
    ]
    assert models.evict("llama", "v1")
    assert not models.evict("llama", "v1")
    assert not path.exists()
    assert models.stats().models == ()


def test_what_changed_is_fetched_and_without_refresh_nothing_is_asked(source, tmp_path, bucket):
    models = ModelCache(tmp_path, source)
    path = models.get("llama", "v1")
    bucket.put("llama/v1/config.json", b"[5]")
    assert (models.get("llama", "v1", refresh=False) / "config.json").read_bytes() == b"{}"
    assert (models.get("llama", "v1") / "config.json").read_bytes() == b"[5]"
    assert path == models.get("llama", "v1")


def test_models_used_least_recently_make_room(source, tmp_path):
    models = ModelCache(tmp_path, source, max_bytes=len(DATA) * 3 // 2)
    models.get("llama", "v1")
    models.get("llama", "v2")
    assert [one.version for one in models.stats().models] == ["v2"]
    assert models.stats().evicted == 1


def test_put(source, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_bytes(b"[6]")
    models = ModelCache(tmp_path / "cache", source)
    models.put("qwen", "v1", tmp_path / "new")
    assert (models.get("qwen", "v1") / "config.json").read_bytes() == b"[6]"


def test_threads_and_processes_share_a_directory(source, tmp_path):
    models, found = ModelCache(tmp_path, source), []
    threads = [threading.Thread(target=lambda: found.append(models.get("llama", "v1"))) for _ in range(4)]
    program = "import sys; from modelfs import ModelCache; print(ModelCache(*sys.argv[1:]).get('llama', 'v1'))"
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), source], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    paths = {str(path) for path in found} | {process.communicate(timeout=60)[0].strip() for process in others}
    assert paths == {str(tmp_path / "llama" / "v1")}
    assert models.stats().fetched_bytes in {0, len(DATA) + 4}


def test_from_the_hub(tmp_path, monkeypatch):
    with Hub().running() as hub:
        commit = hub.repository("org/model").commit(**{"config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        models = ModelCache(tmp_path, "hf://{name}@{version}")
        assert models.get("org/model", commit) == tmp_path / "org%2Fmodel" / commit


def test_errors(source, tmp_path):
    with pytest.raises(ConfigError, match="unknown option 'regoin'"):
        ModelCache(tmp_path, source, regoin="x")
    with pytest.raises(ConfigError, match="where models lie"):
        ModelCache(tmp_path, "s3://bucket/x/")
    models = ModelCache(tmp_path, source)
    for name, version in (("llama", ""), ("../x", "v1"), ("llama", "v1/../../x"), ("a\0b", "v1")):
        with pytest.raises(ConfigError):
            models.get(name, version)
    with pytest.raises(ObjectNotFoundError):
        models.get("nothing", "v1")
    assert models.stats().models == ()


def test_service(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS", source)
    monkeypatch.setenv("MODEL_CACHE", str(tmp_path))
    with TestClient(app) as client:
        answer = client.post("/models/llama/v1")
        assert answer.status_code == 200, answer.text
        assert answer.json()["files"] == ["config.json", "model.safetensors"]
        assert os.path.isdir(answer.json()["path"])
        assert client.post("/models/llama/v9").status_code == 404
        stats = client.get("/cache/stats").json()
        assert [one["version"] for one in stats["models"]] == ["v1"]
        assert client.delete("/models/llama/v1").json() == {"removed": True}
