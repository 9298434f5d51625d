"""What a trace is worth: an engine that reads its shards in another order than the plan expects.

    python -m bench.replay [--runs 5]

A model of eight shards lies on a Ceph RGW behind a 400 MiB/s network. The reader waits a second, as an engine
that imports, then reads the shards backwards and is busy for 0.3 s after each, as one that converts the weights
or copies them to a GPU. (One that only reads ends when the download does, in any order.) Each run is a cold node: an empty cache of its own. The
first ones follow the built-in plan; one of them leaves its trace in the bucket, and the others replay it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench import contenders as ways
from bench.memory import Filler
from bench.micro import read_file
from bench.origin import BUCKET, MIB, NIC, origin

SHARDS = 8
SHARD_MIB = 128
IMPORT_SECONDS = 1.0
WORK_SECONDS = 0.3
TRACE_SECONDS = 4.0
"""A load that has read everything is taken for finished after two seconds of rest."""


class Node(ways.Modelfs):
    """A cold node that shares traces through the bucket."""

    options = ("--trace-uri", f"s3://{BUCKET}/traces/")


def load_backwards(node: ways.Modelfs) -> dict[str, float]:
    """Mount, read, unmount; return wall seconds from the mount and seconds waited for the bucket."""
    node.prepare()
    began = time.monotonic()
    path = node.start()
    time.sleep(IMPORT_SECONDS)
    for shard in sorted(path.glob("*.safetensors"), reverse=True):
        read_file(shard)
        time.sleep(WORK_SECONDS)
    seconds = time.monotonic() - began
    time.sleep(TRACE_SECONDS)
    load = json.loads(
        subprocess.run([ways.MODELFS, "why", "--json", str(path)], check=True, capture_output=True).stdout
    )
    node.stop()
    node.clean()
    return {"seconds": seconds, "waited": load["waited_seconds"]["origin"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    home = Path(tempfile.mkdtemp(prefix="modelfs-replay-"))
    try:
        with origin() as server:
            model = home / "model"
            model.mkdir()
            for number in range(1, SHARDS + 1):
                (model / f"model-{number:05}-of-{SHARDS:05}.safetensors").write_bytes(os.urandom(SHARD_MIB * MIB))
            server.upload(model, "m/")
            server.reshape(NIC)
            filler = Filler(home)
            results: dict[str, list[dict[str, float]]] = {"built-in plan": [], "replayed trace": []}
            arms = {"built-in plan": ways.Modelfs, "replayed trace": Node}
            filler.settle()
            load_backwards(Node(server.store, home / "first", "m/"))  # leaves the trace
            for _ in range(runs):
                for name, kind in arms.items():
                    filler.settle()
                    results[name].append(load_backwards(kind(server.store, home / "node", "m/")))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(f"\n{runs} runs, medians; {SHARDS} shards of {SHARD_MIB} MiB read backwards, {NIC.describe()}\n")
    print("| | mount to last byte, s | waited for the bucket, s |\n|---|---|---|")
    for name, figures in results.items():
        middle = {key: statistics.median(item[key] for item in figures) for key in ("seconds", "waited")}
        print(f"| {name} | {middle['seconds']:.2f} | {middle['waited']:.2f} |")


if __name__ == "__main__":
    main()
