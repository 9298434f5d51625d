"""Work that must not get in the engine's way.

An engine imports its libraries while its model downloads. On a node with few cores the two compete, and the
engine's time is what the user waits for; a download that the engine needs has the processor to itself,
because the engine is waiting.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

BACKGROUND_NICENESS = 10
"""See setpriority(2): a tenth of an ordinary thread's share, and all of what nobody else wants."""

_T = TypeVar("_T")
_this = threading.local()


def in_background(call: Callable[[], _T]) -> _T:
    """Run ``call`` in this thread, which has a low priority from now on: for pooled worker threads only."""
    if not getattr(_this, "low", False):
        _this.low = True
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICENESS)
    return call()
