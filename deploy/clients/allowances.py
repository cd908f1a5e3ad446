"""What a client may ask: requests and tokens per minute, and at least which quality."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from offramp.controller.errors import ConfigError

LOSSLESS: Final = "lossless"
"""The quality of full depth's own output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What one client may ask; None sets no bound.

    Attributes:
        requests_per_minute: Most requests that make tokens.
        tokens_per_minute: Most tokens that they hold and may make, together.
        quality: Least quality of what they make: a share, or "lossless".

    Raises:
        ConfigError: a bound that nothing is within.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    quality: float | Literal["lossless"] | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            most = getattr(self, name)
            if most is not None and not (type(most) is int and most > 0):
                raise ConfigError(name, f"{most!r:.40} is no number above 0", "Write a whole one")
        if self.quality is not None and self.quality != LOSSLESS and not _is_share(self.quality):
            problem = f"{self.quality!r:.40} is no share"
            raise ConfigError("quality", problem, f'Write 0 to 1, or "{LOSSLESS}"')

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Allowance:
        """From a parsed JSON object.

        Raises:
            ConfigError: a bound is unknown or unusable.
        """
        for name in values.keys() - {each.name for each in fields(cls)}:
            raise ConfigError("clients", f"{name!r:.40} bounds nothing that is known", "Remove it")
        return cls(**values)

    @property
    def bounds_requests(self) -> bool:
        """Whether something of it is counted."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def to_values(self) -> dict[str, Any]:
        """Its bounds, as JSON says them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


UNBOUND = Allowance()
"""What whoever has no bounds may ask."""


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
