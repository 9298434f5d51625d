"""The engines whose time to first token is measured: from a model's path to marks on the clock."""

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.contenders import Contender
from bench.origin import BUCKET
from modelfs.cli.embedded import ObjectStore, free_port
from tests.engines import ENVIRONMENT

PYTHON = str(Path(__file__).resolve().parents[2] / ".venv-engines" / "bin" / "python")
HERE = Path(__file__).parent
TIMEOUT_SECONDS = 600.0
PROMPT = [1, 7, 77, 777]
Marks = dict[str, Any]


class Engine:
    """One engine in one way of loading. ``run`` returns marks (monotonic seconds), tokens and device."""

    name = ""
    layout = "safetensors"

    def run(self, path: Path, way: Contender, pids: list[int]) -> Marks:
        """Start the engine on the model directory ``path``, which ``way`` provides.

        ``pids`` receives its process, for who watches it.
        """
        raise NotImplementedError

    def dummy(self, path: Path) -> Marks | None:
        """Run without weights, with the model's small files at ``path``; ``None`` where the engine cannot."""
        return None


class _Script(Engine):
    script = ""

    def _arguments(self, path: Path) -> list[str]:
        raise NotImplementedError

    def run(self, path: Path, way: Contender, pids: list[int]) -> Marks:
        return self._execute(way.wrap(self._command(self._arguments(path))), way.environment, pids)

    def _command(self, arguments: list[str]) -> list[str]:
        return [PYTHON, str(HERE / self.script), *arguments]

    def _execute(self, command: list[str], environment: dict[str, str], pids: list[int]) -> Marks:
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, env={**environment, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
            pids.append(process.pid)
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"{self.name} failed: {errors.read()[-2000:]}")
        marks: Marks = json.loads(output.strip().splitlines()[-1])
        return marks


class Transformers(_Script):
    """from_pretrained; ``copy`` takes the weights out of the files, as a load onto a GPU does."""

    script = "transformers_token.py"

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = "transformers" if mode == "view" else "transformers, weights copied out"

    def _arguments(self, path: Path) -> list[str]:
        return [str(path), self.mode]

    def dummy(self, path: Path) -> Marks | None:
        return self._execute(self._command([str(path), "dummy"]), dict(os.environ), [])


class LlamaCpp(_Script):
    """llama.cpp, mapped or read."""

    script = "llama_token.py"
    layout = "gguf"

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = f"llama.cpp, {mode}"

    def _arguments(self, path: Path) -> list[str]:
        return [str(path / "model.gguf"), self.mode]


class Vllm(Engine):
    """vLLM's OpenAI server: until the answer to the first completion of one token."""

    name = "vLLM"

    def run(self, path: Path, way: Contender, pids: list[int]) -> Marks:
        return self._serve(str(path), [], way.environment, pids, way.wrap)

    def dummy(self, path: Path) -> Marks | None:
        return self._serve(str(path), ["--load-format", "dummy"], dict(os.environ), [])

    def stream(self, store: ObjectStore, prefix: str) -> Marks:
        """Load with the Run:ai Model Streamer, straight from the bucket, as vLLM documents it."""
        environment = {
            **os.environ,
            **store.environment(),
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RUNAI_STREAMER_CONCURRENCY": "16",
        }
        return self._serve(f"s3://{BUCKET}/{prefix.rstrip('/')}", ["--load-format", "runai_streamer"], environment, [])

    def _serve(
        self,
        model: str,
        options: list[str],
        environment: dict[str, str],
        pids: list[int],
        wrap: Callable[[list[str]], list[str]] = list,
    ) -> Marks:
        port = free_port()
        command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "m",
            "--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "512",
            "--max-num-seqs", "4", *options,
        ]  # fmt: skip
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                wrap(command), env={**environment, **ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            pids.append(process.pid)
            try:
                self._await_ready(process, port)
                ready = time.monotonic()
                self._complete(port, 1)
                first_token = time.monotonic()
                text = self._complete(port, 8)
            except RuntimeError as error:
                log.seek(0)
                raise RuntimeError(f"{error}: {log.read()[-3000:]}") from None
            finally:
                self._stop(process)
        return {"loaded": ready, "first_token": first_token, "tokens": text, "device": "cpu"}

    def _await_ready(self, process: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("vLLM did not become ready")

    def _complete(self, port: int, tokens: int) -> str:
        body = {"model": "m", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
        return text

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


ENGINES: dict[str, Engine] = {
    "transformers": Transformers("view"),
    "transformers-copy": Transformers("copy"),
    "llama-mmap": LlamaCpp("mmap"),
    "llama-read": LlamaCpp("read"),
    "vllm": Vllm(),
}
