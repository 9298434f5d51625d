"""Bytes, rates and bars for people; plain lines where nobody watches."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from modelfs.chunks import Step
from modelfs.errors import NotReadyError

_WIDTH = 30
_PLAIN_SECONDS = 2.0
_POLL_SECONDS = 0.25
STALL_SECONDS = 120.0


def human_bytes(count: float) -> str:
    """Return ``1.5 GiB`` for 1610612736."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or (unit == "GiB" and abs(count) < 1024 * 1024):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """Return ``1:02:03`` or ``02:03``."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60:02}:{rest % 60:02}"


class Progress:
    """A bar with bytes, rate and time left on a terminal; a line every two seconds elsewhere.

    Args:
        label: What is progressing.
        out: Where to write; standard error by default, so that output stays parseable.
    """

    def __init__(self, label: str, out: TextIO | None = None) -> None:
        self._label = label
        self._out = out or sys.stderr
        self._began = time.monotonic()
        self._first: int | None = None
        self._shown = 0.0

    def show(self, done: int, total: int, *, last: bool = False) -> None:
        """Show that ``done`` of ``total`` bytes are there."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        rate = (done - self._first) / max(now - self._began, 0.001)
        left = f", {human_seconds((total - done) / rate)} left" if rate > 0 and done < total else ""
        text = f"{human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s{left}"
        if self._out.isatty():
            filled = int(_WIDTH * done / total) if total else _WIDTH
            bar = "█" * filled + "·" * (_WIDTH - filled)
            self._out.write(f"\r\x1b[K{self._label} {bar} {text}" + ("\n" if last else ""))
            self._out.flush()
        elif last or now - self._shown >= _PLAIN_SECONDS:
            self._shown = now
            self._out.write(f"{self._label}: {text}\n")
            self._out.flush()


def follow(label: str, look: Callable[[], Step], mend: str) -> None:
    """Show the work that ``look`` reports until it is finished.

    Raises:
        NotReadyError: Nothing changed for two minutes; ``mend`` says what to do.
    """
    progress = Progress(label)
    seen: object = None
    seen_at = time.monotonic()
    while True:
        step = look()
        progress.show(step.done, step.total, last=step.finished)
        if step.finished:
            return
        if step.mark != seen:
            seen, seen_at = step.mark, time.monotonic()
        elif time.monotonic() - seen_at > STALL_SECONDS:
            raise NotReadyError(f"{label} stands still at {step.done} of {step.total} bytes", mend)
        time.sleep(_POLL_SECONDS)
