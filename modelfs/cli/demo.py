"""``modelfs demo``: the main job on this machine, timed beside download-first.

Starts an object store, puts a small model of random bytes into it, and asks twice how long a reader
waits for the first byte, the first tensor and the whole model: once through a mount, once by
downloading every file first. Everything happens in a temporary directory.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3

from modelfs.chunks import MIB
from modelfs.cli import progress
from modelfs.cli.embedded import ObjectStore, ministack
from modelfs.errors import ModelfsError
from modelfs.fuse.supervisor import unmount
from modelfs.fuse.tuning import mount_at

_BUCKET = "demo"
_PREFIX = "llama-demo/"
_SHARDS = 4
_TENSOR_BYTES = 16 * MIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--mib", type=int, default=1024, metavar="MIB", help="size of the model (default: 1024)")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the start to each step."""

    first_byte: float
    first_tensor: float
    all_resident: float


def run(arguments: argparse.Namespace) -> int:
    """Print the table; return 0 if both ways gave the same bytes.

    Raises:
        ConfigError: No embedded object store is installed.
        ModelfsError: The mount could not be made.
    """
    with tempfile.TemporaryDirectory(prefix="modelfs-demo-") as home, ministack() as store:
        _say("starting an object store and uploading a model of random weights")
        files = _upload(store, max(64, arguments.mib))
        total = sum(files.values())
        _say(f"model: {len(files)} files, {progress.human_bytes(total)}, in s3://{_BUCKET}/{_PREFIX}")
        _say("download first, then read")
        downloaded, reference = _download_first(store, files, Path(home) / "local")
        _say("mount with modelfs, read at once")
        mounted, tensor = _mount(store, files, Path(home))
        _say("the same mount again, cache warm")
        warm, warm_tensor = _mount(store, files, Path(home))
    _print_table({"download first": downloaded, "modelfs, cold": mounted, "modelfs, warm": warm})
    if not reference == tensor == warm_tensor:
        raise ModelfsError("the tensors differ", "report this")
    print("\nThe first tensor is byte for byte the same in all three. The store is a local emulator without")
    print("latency: over a network the download takes longer and the gap grows.")
    return 0


def _say(text: str) -> None:
    print(f"- {text}", flush=True)


def _upload(store: ObjectStore, mib: int) -> dict[str, int]:
    client = boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
    )
    client.create_bucket(Bucket=_BUCKET)
    sizes: dict[str, int] = {}

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=_BUCKET, Key=_PREFIX + name, Body=data)
        sizes[name] = len(data)

    tensors = max(1, mib * MIB // _SHARDS // _TENSOR_BYTES)
    names = [f"model-{number:05}-of-{_SHARDS:05}.safetensors" for number in range(1, _SHARDS + 1)]
    weights = {}
    for name in names:
        entries = {
            f"{name[6:11]}.w{n}": {
                "dtype": "U8",
                "shape": [_TENSOR_BYTES],
                "data_offsets": [n * _TENSOR_BYTES, (n + 1) * _TENSOR_BYTES],
            }
            for n in range(tensors)
        }
        weights.update(dict.fromkeys(entries, name))
        header = json.dumps(entries).encode()
        put(name, len(header).to_bytes(8, "little") + header + os.urandom(_TENSOR_BYTES) * tensors)
    put("model.safetensors.index.json", json.dumps({"weight_map": weights}).encode())
    put("config.json", b'{"architectures": ["LlamaForCausalLM"]}')
    client.close()
    return sizes


def _first_tensor(path: Path) -> bytes:
    """Read header and first tensor as a loader would."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        begin, end = min(entry["data_offsets"] for entry in header.values())
        file.seek(8 + length + begin)
        return file.read(end - begin)


def _download_first(store: ObjectStore, files: dict[str, int], target: Path) -> tuple[Times, bytes]:
    target.mkdir()
    environment = {**os.environ, **store.environment()}
    script = (
        "import boto3,sys\n"
        "c=boto3.client('s3')\n"
        "for n in sys.argv[2:]: c.download_file(" + repr(_BUCKET) + "," + repr(_PREFIX) + "+n, sys.argv[1]+'/'+n)\n"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script, str(target), *files], env=environment, check=True)
    resident = time.monotonic() - began
    shard = target / next(name for name in files if name.endswith(".safetensors"))
    with shard.open("rb") as file:
        file.read(1)
    first_byte = time.monotonic() - began
    tensor = _first_tensor(shard)
    times = Times(first_byte, time.monotonic() - began, resident)
    shutil.rmtree(target)
    return times, tensor


def _mount(store: ObjectStore, files: dict[str, int], home: Path) -> tuple[Times, bytes]:
    began = time.monotonic()
    with _mounted(store, home) as point:
        shard = point / next(name for name in files if name.endswith(".safetensors"))
        with shard.open("rb") as file:
            file.read(1)
        first_byte = time.monotonic() - began
        tensor = _first_tensor(shard)
        first_tensor = time.monotonic() - began
        _modelfs("wait", str(point), "--for", "complete", "--timeout", "300s")
        return Times(first_byte, first_tensor, time.monotonic() - began), tensor


@contextlib.contextmanager
def _mounted(store: ObjectStore, home: Path) -> Iterator[Path]:
    point = home / "mnt"
    point.mkdir(exist_ok=True)
    environment = {**os.environ, **store.environment()}
    options = ["--cache-dir", str(home / "cache"), "--background", "--admin", "off"]
    _modelfs("mount", f"s3://{_BUCKET}/{_PREFIX}", str(point), *options, environment=environment)
    try:
        yield point
    finally:
        _modelfs("umount", str(point))
        if mount_at(str(point)):
            unmount(str(point), lazy=True)


def _modelfs(*words: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run([sys.executable, "-m", "modelfs", *words], env=environment, check=False)
    if done.returncode:
        raise ModelfsError(f"modelfs {words[0]} failed", "see the line above, and: modelfs doctor")


def _print_table(rows: dict[str, Times]) -> None:
    print(f"\n{'seconds from start':18}  {'first byte':>12}  {'first tensor':>12}  {'all resident':>12}")
    for name, times in rows.items():
        print(f"{name:18}  {times.first_byte:12.2f}  {times.first_tensor:12.2f}  {times.all_resident:12.2f}")
