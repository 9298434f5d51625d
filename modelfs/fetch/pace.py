"""How many downloads to run at once, found from what they yield.

Pure: time and byte counts are passed in. Few connections first: on a slow network many would share it so
that no chunk is complete for long, and a reader's own download would get a fraction. While each connection
yields plenty, more are added quickly; where they yield little, a trial says whether that is the network
(more connections gain nothing: go back) or the store's limit per connection (they gain: go on).
"""

from dataclasses import dataclass

STEP = 4
"""Connections at the start, and how many are added at a time."""
INTERVAL_SECONDS = 0.1
PLENTY_BYTES_PER_SECOND = 4 * 1024 * 1024
"""Per connection: at this rate a chunk takes two seconds, and another connection cannot hurt much."""
TRIAL_SECONDS = 1.0
TRIAL_GAIN = 1.25
"""A trial adds a third to all of the connections: half of that must arrive as bytes for it to be kept."""
HOLD_SECONDS = 10.0
"""After a trial that gained nothing."""


@dataclass(slots=True)
class _Trial:
    """More connections than before since ``began``, when the rate was ``rate``."""

    began: float
    received: int
    rate: float


class Pace:
    """The number of downloads allowed now.

    Args:
        limit: Most downloads at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.allowed = min(STEP, limit)
        self._then = 0.0
        self._bytes_then = 0
        self._window_began = 0.0
        self._window_bytes = 0
        self._trial: _Trial | None = None
        self._hold_until = 0.0

    def look(self, now: float, received: int, *, saturated: bool) -> None:
        """Take notice of ``received`` bytes in all at ``now`` (seconds, monotonic).

        Args:
            now: The time.
            received: Bytes since the engine began; never decreases.
            saturated: Whether all allowed downloads were running; otherwise nothing can be learnt.
        """
        elapsed = now - self._then
        if elapsed < 0.9 * INTERVAL_SECONDS:  # timers are a little off
            return
        rate = (received - self._bytes_then) / elapsed
        self._then, self._bytes_then = now, received
        if not saturated or elapsed > 10 * INTERVAL_SECONDS:
            self._window_began, self._window_bytes, self._trial = now, received, None
        elif self._trial is not None:
            self._judge(now, received, self._trial)
        elif self.allowed < self._limit:
            self._consider(now, received, rate)

    def _consider(self, now: float, received: int, rate: float) -> None:
        if rate > self.allowed * PLENTY_BYTES_PER_SECOND:
            self._grow(now, received)
        elif now - self._window_began >= TRIAL_SECONDS and now >= self._hold_until:
            before = (received - self._window_bytes) / (now - self._window_began)
            self._grow(now, received)
            self._trial = _Trial(now, received, before)

    def _judge(self, now: float, received: int, trial: _Trial) -> None:
        if now - trial.began < TRIAL_SECONDS:
            return
        if (received - trial.received) / (now - trial.began) < trial.rate * TRIAL_GAIN:
            self.allowed = max(min(STEP, self._limit), self.allowed - STEP)
            self._hold_until = now + HOLD_SECONDS
        self._trial = None
        self._window_began, self._window_bytes = now, received

    def _grow(self, now: float, received: int) -> None:
        self.allowed = min(self._limit, self.allowed + STEP)
        self._window_began, self._window_bytes = now, received
