"""Counts what clients ask per minute, in the one process that answers them.

Each pool counts for itself: Redis, which may be away, is asked nothing while a client waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from offramp.controller.errors import OfframpError
from offramp.deploy.clients.allowances import UNBOUND, Allowance

MINUTE_S = 60.0

Unit = Literal["requests", "tokens"]


class QuotaError(OfframpError):
    """A client has asked for as much as it may in a minute.

    Attributes:
        unit: What it asked too much of.
        retry_after_s: Seconds after which there is room for the same request again.
    """

    def __init__(self, unit: Unit, most: int, asked: int, retry_after_s: int) -> None:
        self.unit = unit
        self.retry_after_s = retry_after_s
        said = f"{unit}: {most:,} a minute is this key's limit"
        if asked > most:
            remedy = f"this request may take {asked:,}. Shorten the prompt or lower max_tokens."
        else:
            remedy = f"this request takes {asked:,} more. Come back in {retry_after_s} s."
        super().__init__(f"{said}, {remedy}")


class Quotas:
    """Counts requests and tokens of clients in a sliding minute.

    Args:
        allowance: Says what a client may ask, by its name.
    """

    def __init__(self, allowance: Callable[[str], Allowance]) -> None:
        self._allowance = allowance
        self._counts = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(self._counts)

    def of(self, client: str | None) -> Allowance:
        """What a client may ask; None: nobody asked for a key."""
        return UNBOUND if client is None else self._allowance(client)

    def take(self, client: str | None, unit: Unit, cost: int = 1) -> None:
        """Count what a client asks.

        Raises:
            QuotaError: it would be more than it may; then it is not counted.
        """
        most = _most(self.of(client), unit)
        if most is None or client is None:
            return
        item = RateLimitItemPerMinute(most)
        if not self._limiter.hit(item, client, unit, cost=cost):
            wait_s = self._wait_s(item, client, unit, most - cost)
            raise QuotaError(unit, most, cost, max(1, math.ceil(wait_s)))

    def headers(self, client: str | None) -> dict[str, str]:
        """What is left to a client, in OpenAI's headers; nothing of units without a bound."""
        told = {}
        units: tuple[Unit, ...] = ("requests", "tokens")
        for unit in units:
            most = _most(self.of(client), unit)
            if most is None or client is None:
                continue
            item = RateLimitItemPerMinute(most)
            left = self._limiter.get_window_stats(item, client, unit).remaining
            told[f"x-ratelimit-limit-{unit}"] = str(most)
            told[f"x-ratelimit-remaining-{unit}"] = str(left)
            told[f"x-ratelimit-reset-{unit}"] = _duration(self._wait_s(item, client, unit, 0))
        return told

    def _wait_s(self, item: RateLimitItemPerMinute, client: str, unit: Unit, most: int) -> float:
        """Seconds until no more than ``most`` counts."""
        before, before_s, now, now_s = self._counts.get_sliding_window(
            item.key_for(client, unit), item.get_expiry()
        )
        most = max(0, most)  # what never fits gets the time until nothing counts
        left_s = now_s - MINUTE_S  # of this minute; what was counted in it fades in the next one
        if now > most:
            return left_s + MINUTE_S * (1 - most / now)
        if now + before * before_s / MINUTE_S <= most:
            return 0.0
        return before_s - MINUTE_S * (most - now) / before


def _most(allowance: Allowance, unit: Unit) -> int | None:
    return allowance.requests_per_minute if unit == "requests" else allowance.tokens_per_minute


def _duration(seconds: float) -> str:
    """Seconds as OpenAI writes them.

    >>> _duration(0.0), _duration(6.2), _duration(61)
    ('0s', '7s', '1m1s')
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
