"""How long an epoch takes, and how much of that the loop waits for its batches."""

from __future__ import annotations

import time


class Pace:
    """Times an epoch, and its training apart from the evaluations amid it.

    Args:
        num_samples: Training samples that the run had seen before.

    Attributes:
        started: When it was made, in seconds of ``time.monotonic``.
        waited: Seconds in which the loop waited for batches.
        num_batches: The batches that it waited for.
    """

    def __init__(self, num_samples: int = 0) -> None:
        self.started: float = time.monotonic()
        self.waited: float = 0.0
        self.num_batches: int = 0
        self._num_samples = num_samples
        self._aside = 0.0
        self._paused_at: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the start, whatever was done."""
        return time.monotonic() - self.started

    @property
    def seconds(self) -> float:
        """Seconds of training so far, more than 0."""
        paused_at = self._paused_at
        now = time.monotonic() if paused_at is None else paused_at
        return max(now - self.started - self._aside, 1e-9)

    def pause(self) -> bool:
        """Stop counting time as that of training; say whether it was counted."""
        if self._paused_at is not None:
            return False
        self._paused_at = time.monotonic()
        return True

    def go_on(self) -> None:
        """Count time as that of training again."""
        if self._paused_at is not None:
            self._aside += time.monotonic() - self._paused_at
            self._paused_at = None

    def samples_per_second(self, num_samples: int) -> float:
        """Return how many samples a second of training had so far.

        Args:
            num_samples: Training samples that the run has seen by now.
        """
        return float((num_samples - self._num_samples) / self.seconds)
