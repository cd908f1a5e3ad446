"""Many draft-and-verify episodes at once for Stable-Baselines3."""

from __future__ import annotations

from offramp.controller.costs.table import CostTable
from offramp.controller.features import MAX_PENDING
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from offramp.envs.cores.draft_core import DraftExitCore
from offramp.envs.traces.tokens import TokenTraces


class DraftExitVecEnv(CoreVecEnv):
    """``DraftExitEnv`` for ``num_envs`` episodes in one vectorised core.

    Args:
        traces: Recorded tokens.
        costs: As for ``DraftExitEnv``, like all that follow.
        num_envs: Number B of parallel episodes.
        max_pending, cycles, rate: As for ``DraftExitEnv``.

    Attributes:
        core: The episodes; ``core.set_rate`` moves ρ.

    Raises:
        ConfigError: an argument is unusable.
        TraceError: the traces are.
    """

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        max_pending: int = MAX_PENDING,
        cycles: int | None = None,
        rate: float = 1.0,
    ) -> None:
        self.core = DraftExitCore(
            traces, costs, num_envs=num_envs, max_pending=max_pending, cycles=cycles, rate=rate
        )
        super().__init__(self.core)
