"""When to ask a registry again, and how long to wait before: an immutable value that shrinks with each try.

The wait doubles from `min_wait` up to `max_wait`, and half of it is random, so that a thousand nodes that lost
the same registry do not come back together. A longer Retry-After replaces it; one beyond `patience` ends the
tries, because asking earlier than told is refused and waiting that long helps nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Statuses that say "later", not "no". 408 is a server that closed an idle connection; 501, 505 never change.
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})


def is_transient(status: int) -> bool:
    """True for an HTTP status after which the same request may succeed."""
    return status in _LATER


@dataclass(frozen=True, slots=True)
class Retry:
    """What is left of a request's tries. Seconds.

    The defaults are the Go daemon's [http] MaxRetries and MinWaitMsec: 0.03 s doubling eight times waits out
    4 to 8 s in all, a registry's restart. Its MaxWaitMsec of 300 s is never reached within eight tries.
    """

    attempts: int = 8
    min_wait: float = 0.03
    max_wait: float = 30.0
    patience: float = 60.0
    used: int = 0

    def after_failure(self, jitter: float, retry_after: float | None = None) -> tuple[float, Retry] | None:
        """How long to wait before the next try and what is left then; None when no try is left.

        `jitter` is a random number in [0, 1); `retry_after` what the server asked for.
        """
        if self.used >= self.attempts:
            return None
        if retry_after is not None and retry_after > self.patience:
            return None
        # min(used, 32): beyond it the wait is max_wait anyway, and 2.0 ** used must not overflow.
        backoff: float = min(self.min_wait * 2.0 ** min(self.used, 32), self.max_wait)
        wait = backoff * (0.5 + jitter / 2)
        if retry_after is not None:
            wait = max(wait, retry_after)
        return wait, replace(self, used=self.used + 1)
