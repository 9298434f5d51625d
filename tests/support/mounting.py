"""Real mounts for tests: the program in a subprocess, the kernel, and the control socket."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from modelfs.cli.client import request, status_of
from modelfs.cli.embedded import ObjectStore
from modelfs.fuse.supervisor import unmount
from modelfs.fuse.tuning import Mount, mount_at

PROGRAM = [sys.executable, "-m", "modelfs"]


def run(*words: str, env: dict[str, str] | None = None, timeout: float = 60) -> "subprocess.CompletedProcess[str]":
    """Run a modelfs command to its end."""
    return subprocess.run(
        [*PROGRAM, *words], env=env or dict(os.environ), capture_output=True, text=True, timeout=timeout, check=False
    )


class Mounted:
    """A mount in the foreground of a subprocess; ``log`` is what it writes."""

    def __init__(
        self, store: ObjectStore, sources: list[str], root: Path, *options: str, env: dict[str, str] | None = None
    ):
        self.path = root / "mnt"
        self.cache = root / "cache"
        with contextlib.suppress(FileExistsError):  # or a dead mount, which a second mount clears
            os.mkdir(self.path)
        self._log_path = root / "log"
        self.environment = {**os.environ, **store.environment(), **(env or {})}
        defaults = [] if "--admin" in options else ["--admin", "off"]
        defaults += [] if "--cache-dir" in options else ["--cache-dir", str(self.cache)]
        defaults += [] if "--cache-size" in options else ["--cache-size", "4GiB", "--min-free", "64MiB"]
        self._command = [*PROGRAM, "mount", *sources, str(self.path), *defaults, *options]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Mounted":
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        done = run("wait", str(self.path), "--timeout", "30s")
        assert done.returncode == 0, f"{done.stderr}\n{self.log}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(10)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if mount_at(str(self.path)):
                unmount(str(self.path), lazy=True)

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def mount(self) -> Mount:
        mount = mount_at(str(self.path))
        assert mount is not None
        return mount

    def status(self) -> dict[str, Any]:
        return status_of(self.mount)

    def metrics(self) -> dict[str, float]:
        """Sample (name with labels) to value."""
        lines = request(self.mount, "GET", "/metrics")[1].decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def worker_pid(self) -> int:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def kill_worker(self) -> None:
        """SIGKILL the worker and wait until another one has taken its place."""
        pid = self.worker_pid()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            try:
                if self.worker_pid() != pid:
                    return
            except AssertionError:
                pass
            time.sleep(0.01)
        raise AssertionError("no new worker")

    def wait_complete(self, path: str = "", timeout: int = 60) -> None:
        done = run("wait", str(self.path / path), "--for", "complete", "--timeout", f"{timeout}s")
        assert done.returncode == 0, f"{done.stderr}\n{self.log}"
