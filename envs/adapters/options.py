"""What the adapters of a core pass on to it, as types."""

from __future__ import annotations

from typing import Literal, TypedDict

from offramp.envs.charges.tradeoffs import Range
from offramp.envs.cores.actions import ActionKind
from offramp.envs.traces.qualities import Quality

DebtMode = Literal["project", "defer"]


class TokenOptions(TypedDict, total=False):
    """Options of ``TokenExitCore``, which says what they mean and by default are."""

    lambda_range: Range
    quality: Quality
    actions: ActionKind
    jumps: int | None
    asks_first: bool
    ends: bool
    energy_range: Range | None


class SequenceOptions(TokenOptions, total=False):
    """Options of ``SequenceExitCore``, which says what they mean and by default are."""

    horizon: int
    kv_mode: DebtMode
    debt_loss: float
    debt_power: float
    max_pending: int
    rider_share: float | None
    rows: tuple[int, ...]
