"""One token as a Gymnasium environment. The class docstring is the specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded

from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.envs.core import DEFAULT_LAMBDA_RANGE, TokenExitCore
from offramp.envs.spaces import action_space, observation_space, start_arguments
from offramp.envs.store import open_traces
from offramp.envs.tokens import Quality, TokenTraces


class TokenExitEnv(gym.Env[FloatArray, np.int64]):
    """Leave the model early, or go on to the next exit: one recorded token is one episode.

    ## Observation

    ``Box(float32)`` of F + 1 columns: the candidate features at the present exit, in the order of
    the traces' feature schema, then the preference. The space declares the bounds ±100 for every
    feature and ±14 for the preference, the same for all traces; the columns of ``candidates``
    version 1 stay in these tighter ranges:

    | column | meaning | range | unit |
    |---|---|---|---|
    | top1 | candidate softmax: probability of the best | 0 … 1 | probability |
    | margin | best minus second best | 0 … 1 | probability |
    | entropy | of that softmax, divided by ln k | 0 … 1 | share |
    | top_logit | raw score of the best candidate / 10 | −100 … 100 | 10 logits |
    | cosine | hidden state to that of the last probe | −1 … 1 | cosine |
    | norm_change | ln of the norm over that of the last probe | −100 … 100 | nats |
    | agrees | best candidate as at the last probe | 0, 1 | flag |
    | run_length | probes in a row with the same best / E | 0 … 1 | share |
    | top1_change | top1 minus that of the last probe | −1 … 1 | probability |
    | depth | layer / number of layers | 0 … 1 | share |
    | position | token position / context length | 0 … 1 | share |
    | log_lambda | ln λ, constant in an episode | −14 … 14 | nats |

    ## Action

    ``Discrete(2)``: 0 goes on to the next exit, 1 leaves here.

    ## Reward

    With cost[i] the measured cost of leaving at exit i, in units of the full-depth token's time
    and with all probes and decisions up to there (``CostTable.leaving``), quality[i] in [0, 1]
    and i = E for full depth, the undiscounted return (γ = 1) of an episode is

        (quality[i] − λ · cost[i]) / (1 + λ)

    Each step pays for having come to the present exit, −λ · (cost[i] − cost[i−1]) / (1 + λ) with
    cost[−1] = 0. The last step adds quality / (1 + λ); going on after the last exit also pays the
    rest of the way, to cost[E]. ``logprob_gap`` quality is 1 + clip(gap, −5, 0) / 5 nats,
    ``agreement`` is 1 if the token is the full-depth one, else 0; full depth has quality 1.

    ## Start

    At the first exit of a token drawn uniformly, with λ drawn log-uniformly from
    ``lambda_range``. ``reset(options={"token": row, "lambda": value})`` sets either.

    ## End

    ``terminated`` when it leaves, or goes on after the last exit; at most E steps. Never
    truncated. The last observation is the one that the last action answered.

    ## Info

    Empty, but at the end: ``quality``, ``cost`` (full-depth token's time), ``exit_layer`` (layers
    executed), ``agree`` (0 or 1), ``token`` (row of the traces), ``lambda``.

    ## Arguments

    - ``costs``: measured ``CostTable`` of the model that was recorded.
    - ``traces`` or ``store``: tokens in memory, or the folder of a ``TraceStore``.
    - ``split``: with ``store``, which split; None takes all.
    - ``lambda_range``: lowest and highest λ, within 1e-6 … 1e6; equal for a single one.
    - ``quality``: ``logprob_gap`` or ``agreement``.

    Raises ``ConfigError`` for an unusable argument, option or action, ``TraceError`` for an
    unusable store, and ``gymnasium.error.ResetNeeded`` for a step outside an episode.

    ## Example

    >>> import gymnasium as gym, numpy as np, offramp.envs
    >>> from offramp.controller.costs import CostTable
    >>> from offramp.controller.features import CANDIDATES_V1
    >>> from offramp.controller.traces import TraceHeader
    >>> token = np.ones((1, 2), np.float32)
    >>> traces = offramp.envs.TokenTraces(
    ...     header=TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=(2, 4), layers=8),
    ...     features_NEF=np.zeros((1, 2, CANDIDATES_V1.width), np.float32),
    ...     softmax_NES=np.ones((1, 2, 3), np.float32), exit_token_NE=np.ones((1, 2), np.int32),
    ...     agree_NE=token, gap_NE=-1 * token, right_NE=token,
    ...     full_right_N=np.ones(1, np.float32), position_N=np.zeros(1, np.int32),
    ...     document_N=np.zeros(1, np.int32),
    ...     documents=("d",),
    ... )
    >>> costs = CostTable(layer_s=1.0, head_s=2.0, probe_s=0.0, policy_s=0.0, fill_s=0.0,
    ...                   step_s=0.0, layers=8, machine="example")
    >>> env = gym.make("offramp/TokenExit-v0", traces=traces, costs=costs, lambda_range=(1, 1))
    >>> obs, info = env.reset(seed=0)
    >>> obs.shape
    (12,)
    >>> obs, paid, terminated, truncated, info = env.step(0)  # go on: pay for 2 layers and head
    >>> round(float(paid), 3), terminated
    (-0.2, False)
    >>> obs, reward, terminated, truncated, info = env.step(1)  # leave after layer 4
    >>> terminated, info["exit_layer"], round(info["cost"], 3), round(info["quality"], 3)
    (True, 4, 0.6, 0.8)
    >>> round(float(paid + reward), 3)  # (0.8 − 1 · 0.6) / (1 + 1)
    0.1

    ## Version history

    - v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]  # gymnasium's is no ClassVar

    def __init__(
        self,
        *,
        costs: CostTable,
        traces: TokenTraces | None = None,
        store: Path | str | None = None,
        split: str | None = None,
        lambda_range: tuple[float, float] = DEFAULT_LAMBDA_RANGE,
        quality: Quality = "logprob_gap",
    ) -> None:
        self._core = TokenExitCore(
            open_traces(traces, store, split),
            costs,
            num_envs=1,
            lambda_range=lambda_range,
            quality=quality,
            autoreset=False,
        )
        self._running = False
        self.observation_space = observation_space(self._core.num_columns)
        self.action_space = action_space()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start an episode: observation [F + 1] and an empty info.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        super().reset(seed=seed)
        obs_1D = self._core.reset(self.np_random, **start_arguments(options))
        self._running = True
        return obs_1D[0], {}

    def step(self, action: SupportsInt) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Go on (0) or leave (1).

        Raises:
            ConfigError: the action is neither 0 nor 1.
            ResetNeeded: no episode is running.
        """
        if not self._running:
            raise ResetNeeded("no episode is running: call reset() before step()")
        if not self.action_space.contains(action):
            raise ConfigError("action", f"is {action!r}", "Use 0 to go on and 1 to leave")
        batch = self._core.step(np.array([int(action)]))
        ended = bool(batch.terminated_B[0])
        self._running = not ended
        info = batch.finals.rows()[0] if ended else {}
        return batch.obs_BD[0], float(batch.reward_B[0]), ended, False, info
