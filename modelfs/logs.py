"""Log lines of every process of a mount: text or JSON, to stderr."""

import json
import logging
import time
from collections.abc import Hashable

_NOISY = (
    "azure",
    "boto3",
    "botocore",
    "gcsfs",
    "google",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "s3transfer",
    "urllib3",
)


def setup_logging(level: str, form: str) -> None:
    """Send log lines to stderr.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        form: ``text`` or ``json``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in _NOISY:
        # Their debug lines hold signed headers.
        logging.getLogger(noisy).setLevel(logging.CRITICAL if noisy == "gcsfs" else logging.ERROR)


class Seldom:
    """Keeps a message that could come a thousand times to one in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._said: dict[Hashable, float] = {}

    def __call__(self, what: Hashable) -> bool:
        """Return whether it is time to say ``what``; these are few, as classes and error numbers are."""
        now = time.monotonic()
        if now - self._said.get(what, float("-inf")) < self._seconds:
            return False
        self._said[what] = now
        return True


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
