"""Reads of every kind through the mount, beside FUSE peers, a plain download and the local file system.

    python -m bench.micro [--shapes s3,unshaped,tls] [--runs 3] [--contenders ...] [--only sequential,...]

One Ceph RGW on loopback serves everyone, shaped like a distant store, as fast as it can, and with TLS.
Contenders take turns; each starts cold (an empty cache), again warm (everything in its cache, out of the page
cache), and reads large files once more ("cached": from the page cache). The clock runs for the reads alone, the mount being there. CPU counts every process of a contender
until two seconds after the last byte; requests and bytes are the gateway's own counts. Ratios are of medians
of the same run: absolute times of a shared machine mean little. Needs root and what ``make bench`` installs.
"""

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench import contenders as ways
from bench.memory import Filler
from bench.origin import BUCKET, MIB, S3_LIKE, TLS, UNSHAPED, Origin, Shape, origin
from bench.usage import cpu_seconds, peak_mib

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {shape.name: shape for shape in (S3_LIKE, UNSHAPED, TLS)}
REDUCED = {UNSHAPED.name: ("sequential", "readers"), TLS.name: ("sequential read",)}
"""Shapes in which only these workloads say something new."""
REST_SECONDS = 2.0
"""After the last byte: what is then still written or committed belongs to the cost."""
SHARDS, SHARD_MIB = 16, 32
FIRST_BYTE_OBJECTS = 20
FIRST_BYTES = 4096
SMALL_FILES, SMALL_BYTES = 10_000, 4096
COLD, WARM, CACHED = "cold", "warm", "cached"


def read_file(path: Path) -> None:
    """Read in 1 MiB blocks into one reused buffer."""
    buffer = memoryview(bytearray(MIB))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_mapped(path: Path) -> None:
    """Touch every byte through a mapping, as a tensor copy does."""
    buffer = bytearray(MIB)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = memoryview(mapped)
        for start in range(0, len(view), MIB):
            piece = view[start : start + MIB]
            buffer[: len(piece)] = piece
            piece.release()
        view.release()


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that ``action`` takes."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def fio(directory: Path, jobs: int, *options: str) -> float:
    """Let ``jobs`` readers share out the files of ``directory``; return the seconds of the slowest, without fio's start."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    words = ["fio", "--output-format=json", "--readonly", "--invalidate=0", "--ioengine=psync", *options]
    for number in range(jobs):
        mine = files[number::jobs] or files
        words += [f"--name=reader{number}", "--filename=" + ":".join(str(path) for path in mine)]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(max(job["read"]["runtime"] for job in json.loads(shown[shown.index("{") :])["jobs"])) / 1000


def readers(count: int) -> Callable[[Path], float]:
    """Return a workload in which so many readers read every file once, in order."""
    return lambda path: fio(path, count, "--rw=read", "--bs=1M", "--file_service_type=sequential")


def random_reads(path: Path) -> float:
    """Four readers, 128 reads of 1 MiB each, in a random order that is the same for all."""
    return fio(path, 4, "--rw=randread", "--bs=1M", "--io_size=128M", "--randseed=7")


def random_small_reads(path: Path) -> float:
    """Four readers, 4096 reads of 4 KiB each."""
    return fio(path, 4, "--rw=randread", "--bs=4k", "--io_size=16M", "--randseed=7")


def read_small_files(path: Path) -> float:
    """Eight at a time."""
    script = "find . -type f -print0 | xargs -0 -n 64 -P 8 cat > /dev/null"
    return timed(lambda: subprocess.run(["sh", "-c", script], cwd=path, check=True))


@dataclass(frozen=True, slots=True)
class Workload:
    """What is read: the prefix in the bucket, how (from the directory to seconds), and the bytes read."""

    name: str
    prefix: str
    run: Callable[[Path], float]
    volume: int
    states: tuple[str, ...] = (COLD, WARM)
    raw: bool = False
    """Whether a plain download of the prefix does the same job."""
    partial: bool = False
    """Whether a cold run leaves something out of the cache."""


def workloads(mib: int) -> list[Workload]:
    """Return all of them for one large object of so many MiB."""
    big, shards = mib * MIB, SHARDS * SHARD_MIB * MIB
    return [
        Workload(
            "sequential read",
            "big",
            lambda path: timed(lambda: read_file(path / "object")),
            big,
            (COLD, WARM, CACHED),
            raw=True,
        ),
        Workload(
            "sequential mmap",
            "big",
            lambda path: timed(lambda: read_mapped(path / "object")),
            big,
            (COLD, WARM, CACHED),
        ),
        *(
            Workload(f"{count} readers of 16 files", "shards", readers(count), shards, raw=count == SHARDS)
            for count in (1, 4, 16)
        ),
        Workload("random 1 MiB", "shards", random_reads, 4 * 128 * MIB, partial=True),
        Workload("random 4 KiB", "shards", random_small_reads, 4 * 16 * MIB, states=(WARM,), partial=True),
        Workload("10 000 small files", "small", read_small_files, SMALL_FILES * SMALL_BYTES, raw=True),
    ]


@dataclass(slots=True)
class Record:
    """Everything measured for one shape, workload, state and contender."""

    shape: str
    workload: str
    state: str
    contender: str
    volume: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    origin_requests: list[int] = field(default_factory=list)
    origin_bytes: list[int] = field(default_factory=list)

    def median(self, name: str = "seconds") -> float:
        return float(statistics.median(getattr(self, name)))


class ModelfsCopied(ways.Modelfs):
    """Complete files that the kernel reads through us: they were open before they were complete."""

    options = ("--prefetch", "off")

    def warm(self) -> None:
        """Leave the files open while they are downloaded."""
        self._held = [path.open("rb") for path in self.point.rglob("*") if path.is_file()]
        for file in self._held:
            file.read(1)
        subprocess.run([ways.MODELFS, "warm", str(self.point)], check=True, stderr=subprocess.DEVNULL)

    def stop(self) -> dict[str, float]:
        for file in self._held:
            file.close()
        return super().stop()


MOUNTS: dict[str, type[ways.Contender]] = {
    "modelfs": ways.Modelfs,
    "modelfs-demand": ways.ModelfsOnDemand,
    "modelfs-copied": ModelfsCopied,
    "rclone": ways.Rclone,
    "s3fs": ways.S3fs,
}
LOCAL, RAW = "local", "s5cmd"


class Bench:
    """All runs."""

    def __init__(self, server: Origin, home: Path, arguments: argparse.Namespace) -> None:
        self.server = server
        self.home = home
        self.runs: int = arguments.runs
        self.wanted: list[str] = arguments.contenders.split(",")
        self.filler = Filler(home)
        self.records: dict[tuple[str, str, str, str], Record] = {}
        self.descriptions: dict[str, str] = {}
        self.extra: dict[str, dict[str, list[float]]] = {}
        self.workloads = [work for work in workloads(arguments.mib) if _named(work, arguments.only.split(","))]

    def upload(self, mib: int) -> None:
        """Write the data locally and put it into the bucket."""
        block = os.urandom(64 * MIB)
        sizes = {"big/object": mib * MIB}
        sizes |= {f"shards/part-{number:02}": SHARD_MIB * MIB for number in range(SHARDS)}
        sizes |= {f"first/object-{number:02}": 8 * MIB for number in range(2 * FIRST_BYTE_OBJECTS)}
        if any(work.prefix == "small" for work in self.workloads):
            sizes |= {f"small/{number // 100:03}/{number:05}": SMALL_BYTES for number in range(SMALL_FILES)}
        for number, (name, size) in enumerate(sizes.items()):
            path = self.home / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(number.to_bytes(8, "big") + block[8 : min(size, len(block))])
                while file.tell() < size:
                    file.write(file.tell().to_bytes(8, "big") + block[8:])
            os.truncate(path, size)
        download = ways.S5cmd(self.server.store, self.home / "upload", "")
        words = [*download.command[:3], "--log", "error", "cp", f"{self.home / 'data'}/", f"s3://{BUCKET}/"]
        subprocess.run(words, env=download.environment, check=True)

    def _record(self, shape: Shape, work: Workload, state: str, contender: str) -> Record:
        key = (shape.name, work.name, state, contender)
        return self.records.setdefault(key, Record(*key, work.volume))

    def measure(self, shape: Shape) -> None:
        """Let every contender do every workload so often as asked, in turns."""
        self.first_byte(shape)
        for work in (work for work in self.workloads if _named(work, REDUCED.get(shape.name, ("",)))):
            for number in range(self.runs):
                if LOCAL in self.wanted:
                    self._local(shape, work)
                if RAW in self.wanted and work.raw:
                    self._raw(shape, work)
                for name in self.wanted:
                    if name in MOUNTS:
                        self._mount(shape, work, name)
                print(f"{shape.name} · {work.name} · run {number + 1} of {self.runs}", flush=True)
            for path in self.home.glob("way-*"):
                shutil.rmtree(path)

    def _local(self, shape: Shape, work: Workload) -> None:
        directory = self.home / "data" / work.prefix
        for state in work.states:
            if state != CACHED:
                ways.drop_pages(directory)
                self.filler.settle()
            self._record(shape, work, state, LOCAL).seconds.append(work.run(directory))

    def _raw(self, shape: Shape, work: Workload) -> None:
        """Download the prefix, to /dev/null where it is one object, else to the disk."""
        way = ways.S5cmd(self.server.store, self.home / "way-s5cmd", f"{work.prefix}/")
        way.prepare()
        command = way.command
        if work.prefix == "big":
            command = [*command[: command.index("cp")], "cat", *command[command.index("cp") + 1 : -2]]
            command.append(f"s3://{BUCKET}/big/object")
        self.filler.settle()
        record, before = self._record(shape, work, COLD, RAW), self.server.sent()
        began = time.monotonic()
        process = subprocess.Popen(command, env=way.environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"s5cmd failed with {status}")
        record.seconds.append(time.monotonic() - began)
        process.returncode = status
        record.cpu_seconds.append(usage.ru_utime + usage.ru_stime)
        record.peak_mib.append(usage.ru_maxrss / 1024)
        self._note_sent(record, before)
        way.clean()

    def _note_sent(self, record: Record, before: tuple[int, int]) -> None:
        now = self.server.sent()
        record.origin_requests.append(now[0] - before[0])
        record.origin_bytes.append(now[1] - before[1])

    def _mount(self, shape: Shape, work: Workload, name: str) -> None:
        way = MOUNTS[name](self.server.store, self.home / f"way-{name}", f"{work.prefix}/")
        self.descriptions.setdefault(name, way.describe())
        way.prepare()
        self.filler.settle()
        copied = isinstance(way, ModelfsCopied)
        path = self._started(way)
        try:
            if isinstance(way, ModelfsCopied):
                way.warm()
            elif COLD in work.states:
                self._run(self._record(shape, work, COLD, name), way, path, work)
            if work.partial and not copied:
                readers(1)(path)
        finally:
            if not copied:
                time.sleep(REST_SECONDS)
                way.stop()
        try:
            if not copied:
                path = self._started(way)
            ways.drop_pages(way.home / "cache")
            self.filler.settle()
            for state in (state for state in work.states if state != COLD):
                self._run(self._record(shape, work, state, name), way, path, work)
        finally:
            way.stop()
        way.clean()

    def _started(self, way: ways.Contender) -> Path:
        """Start ``way``; return its path once something is there. The time goes on record."""
        began = time.monotonic()
        path = way.start()
        while not any(path.iterdir()) and time.monotonic() < began + 10:
            time.sleep(0.02)
        self.extra.setdefault("mount to first listing", {}).setdefault(type(way).__name__, []).append(
            time.monotonic() - began
        )
        return path

    def _run(self, record: Record, way: ways.Contender, path: Path, work: Workload) -> None:
        pids, before = way.pids(), self.server.sent()
        cpu = cpu_seconds(pids)
        record.seconds.append(work.run(path))
        time.sleep(REST_SECONDS)
        record.cpu_seconds.append(cpu_seconds(pids) - cpu)
        record.peak_mib.append(peak_mib(pids))
        self._note_sent(record, before)

    def first_byte(self, shape: Shape) -> None:
        """One 4 KiB read of a cold object, beside one raw ranged GET on a connection that is open already."""
        found: dict[str, list[float]] = {"raw GET": []}
        arms = {
            name: MOUNTS[name](self.server.store, self.home / f"way-{name}", "first/")
            for name in self.wanted
            if name in MOUNTS and name != "modelfs-copied"
        }
        paths = {}
        for name, way in arms.items():
            way.prepare()
            paths[name] = self._started(way)
            found[name] = []
        try:
            for number in range(2 * FIRST_BYTE_OBJECTS):
                for name, path in paths.items():
                    found[name].append(timed(lambda: _first_bytes(path / f"object-{number:02}")))
                    time.sleep(0.2)  # the rest of the file comes in meanwhile
                found["raw GET"].append(timed(lambda: self._ranged_get(f"first/object-{number:02}")))
        finally:
            for way in arms.values():
                way.stop()
                way.clean()
        # The first half opens the connections.
        self.extra[f"first byte, {shape.name}"] = {name: times[FIRST_BYTE_OBJECTS:] for name, times in found.items()}

    def _ranged_get(self, key: str) -> None:
        range_ = f"bytes=0-{FIRST_BYTES - 1}"
        assert len(self.server.client.get_object(Bucket=BUCKET, Key=key, Range=range_)["Body"].read()) == FIRST_BYTES

    def large(self, mib: int) -> None:
        """Peak memory with an object many times the budget."""
        block = os.urandom(64 * MIB)
        with tempfile.NamedTemporaryFile(dir=self.home) as file:
            for _ in range(mib // 64):
                file.write(block)
            file.flush()
            self.server.client.upload_file(file.name, BUCKET, "large/object")
        way = ways.Modelfs(self.server.store, self.home / "large", "large/")
        way.prepare()
        read_file(way.start() / "object")
        self.extra["peak MiB"] = {f"{mib} MiB object": [way.stop()["peak_mib"]]}
        way.clean()
        self.server.client.delete_object(Bucket=BUCKET, Key="large/object")

    def listing(self) -> None:
        """``ls -lR`` of the small files, after the mount."""
        way = ways.ModelfsOnDemand(self.server.store, self.home / "listing", "small/")
        way.prepare()
        command = ["ls", "-lR", str(way.start())]
        times = [
            timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) for _ in range(self.runs)
        ]
        self.extra["ls -lR of 10 000 keys"] = {"modelfs": times}
        way.stop()


def _named(work: Workload, words: Iterable[str]) -> bool:
    return any(word in work.name for word in words)


def _first_bytes(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert len(os.pread(descriptor, FIRST_BYTES, 0)) == FIRST_BYTES
    finally:
        os.close(descriptor)


def markdown(bench: Bench, title: str) -> str:
    """Return a table per shape, and the figures that stand alone."""
    lines = [title, "", *(f"- {name}: {text}" for name, text in bench.descriptions.items())]
    shapes = dict.fromkeys(record.shape for record in bench.records.values())
    for shape in shapes:
        lines += ["", f"### {shape}: {SHAPES[shape].describe()}", ""]
        lines += ["| workload | | contender | s | ÷ local | CPU s/GB | peak MiB | GETs | bytes ÷ read |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for record in (record for record in bench.records.values() if record.shape == shape):
            local = bench.records.get((shape, record.workload, record.state, LOCAL))
            row = [record.workload, record.state, record.contender, f"{record.median():.3f}"]
            row.append(f"{record.median() / local.median():.2f}" if local else "")
            if record.cpu_seconds:
                row.append(f"{record.median('cpu_seconds') / record.volume * 1e9:.2f}")
                row.append(f"{max(record.peak_mib):.0f}")
                row.append(f"{record.median('origin_requests'):.0f}")
                row.append(f"{record.median('origin_bytes') / record.volume:.3f}")
            else:
                row += [""] * 4
            lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| | | median |", "|---|---|---|"]
    for name, figures in bench.extra.items():
        lines += [f"| {name} | {who} | {statistics.median(times):.4f} |" for who, times in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    everyone = [LOCAL, RAW, *MOUNTS]
    parser.add_argument("--contenders", default=",".join(everyone), help=f"of {', '.join(everyone)}")
    parser.add_argument("--only", default="", help="workloads whose names contain one of these words")
    parser.add_argument("--mib", type=int, default=1024, help="size of the large object")
    parser.add_argument("--large-mib", type=int, default=8192, help="object for peak memory; 0 leaves it out")
    parser.add_argument("--output", default=str(ROOT / "bench" / "results"), help="directory of record and table")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="modelfs-micro-"))
    try:
        with origin() as server:
            bench = Bench(server, home, arguments)
            bench.upload(arguments.mib)
            for name in arguments.shapes.split(","):
                server.reshape(SHAPES[name])
                bench.measure(SHAPES[name])
            server.reshape(UNSHAPED)
            if any(work.prefix == "small" for work in bench.workloads):
                bench.listing()
            if arguments.large_mib:
                bench.large(arguments.large_mib)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    records = [{name: getattr(item, name) for name in Record.__dataclass_fields__} for item in bench.records.values()]
    (output / "micro.json").write_text(json.dumps({"records": records, "extra": bench.extra}, indent=1))
    title = f"{arguments.runs} runs, medians; {os.cpu_count()} cores, Linux {platform.release()}, Ceph RGW on loopback"
    text = markdown(bench, title)
    (output / "micro.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
