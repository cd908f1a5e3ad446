"""A prompt that a real engine reads. The class docstring is the specification.

Shape suffixes: V objectives of a reward vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

from offramp.controller.costs.table import CostTable
from offramp.envs.charges.token_costs import require_costs_of
from offramp.envs.charges.tradeoffs import DEFAULT_LAMBDA_RANGE, Range, Weights
from offramp.envs.cores.batch import RewardArray
from offramp.envs.cores.walk import Actions
from offramp.envs.live.session import Moment, PromptSession
from offramp.envs.live.session_env import SessionEnv

OBJECTIVES = ("quality", "saved")


class PrefillExitEnv(SessionEnv):
    """Read a prompt with a real engine, and say of each token at each exit whether it leaves.

    The counterpart of ``LiveExitEnv`` for the tokens of a prompt. The tokens of a chunk are asked
    about one after the other, exit by exit, as the engine's policy for prompts would be; those that
    it keeps (``keep_first``, ``keep_last``) are not. Deeper layers and later chunks read the keys
    and values that exits have left behind.

    ## Observation

    ``Box(float32)`` of F + 1 columns: PROMPT_V1 of the token at the present exit, as the engine's
    probe computed it, and log λ.

    ## Action

    ``Discrete(2)``: 0 goes on to the next exit (from the last one to full depth), 1 leaves.

    ## Reward

    Summed over the episode, undiscounted,

        (quality + λ · saved) / (1 + λ)

        quality = loss of what follows, the prompt read in full − the same, read so   [nats / token]
        saved   = (1 − fill / layer) · (calls in full − calls) / calls in full

    Losses are of the document's own next tokens, fed at full depth behind either prompt. Calls are
    layers run, summed over the prompt's tokens, adapter layers included: the engine counts them,
    they are not estimated. fill and layer are the table's prices of one skipped layer's keys and
    values, and of one layer, for one row. Neither probes nor decisions are priced.

    A token's share of ``saved`` comes with the decision that lets it leave, and ``quality`` with
    the last one, together with whatever the engine's count says otherwise. So the sum is exact, and
    credit for time needs no waiting.

    ## Start

    With a prompt drawn by the session and λ drawn log-uniformly; ``reset(options={"lambda":
    value})`` sets it.

    ## End

    ``terminated`` after the last question about the prompt. Never truncated.

    ## Info

    - each step: ``reward_vector`` (quality, saved), unweighted.
    - at the end: ``quality``, ``saved``, ``loss``, ``full_loss``, ``calls``, ``full_calls``,
      ``left`` (tokens that left early), ``asked`` (decisions), ``prompt`` (which of the session's),
      ``lambda``.

    ## Arguments

    - ``open_session``: gives the ``PromptSession``; it is closed with the environment.
    - ``costs``: measured ``CostTable`` of the session's model, or one of constants.
    - ``lambda_range``: preferences drawn per episode.

    Raises ``ConfigError`` for an unusable argument, option or action, ``ResetNeeded`` for a step
    outside an episode, and whatever the session raises.

    ## Example

    A session can be anything that reads; here, prompts of two tokens, each asked once.

    >>> import gymnasium as gym, numpy as np, offramp.envs
    >>> from offramp.controller.costs.table import CostTable
    >>> from offramp.controller.features import PROMPT_V1
    >>> from offramp.envs.live.session import Moment, Question, ReadPrompt
    >>> class Two:
    ...     model, exits, layers, schema, prompt_tokens = "m", (2,), 8, PROMPT_V1, 2
    ...     def begin(self, rng):
    ...         self.asked, self.calls = 1, 0
    ...         return self.ask()
    ...     def ask(self):
    ...         features = np.zeros(PROMPT_V1.width, np.float32)
    ...         return Moment((), Question(0, features, np.zeros(0, np.float32)))
    ...     def answer(self, target):
    ...         self.calls += 2 if target == 0 else 8
    ...         if self.asked == 2:
    ...             read = ReadPrompt(prompt=0, calls=self.calls, full_calls=16, left=1,
    ...                               loss=1.25, full_loss=1.0)
    ...             return Moment((), None, read)
    ...         self.asked += 1
    ...         return self.ask()
    ...     def close(self):
    ...         pass
    >>> costs = CostTable(layer_s=1.0, head_s=2.0, probe_s=0.0, policy_s=0.0, fill_s=0.0,
    ...                   step_s=0.0, layers=8, machine="example")
    >>> env = gym.make("offramp/PrefillExit-v0", open_session=Two, costs=costs, lambda_range=(1, 1))
    >>> obs, info = env.reset(seed=0)
    >>> obs, reward, terminated, truncated, info = env.step(1)  # leave after layer 2 of 8
    >>> float(reward), terminated  # 6 of 16 calls
    (0.1875, False)
    >>> obs, reward, terminated, truncated, info = env.step(0)  # all layers
    >>> float(reward), terminated, info["saved"]  # a quarter of a nat lost
    (-0.125, True, 0.375)
    >>> env.close()

    ## Version history

    - v0: first version.
    """

    def __init__(
        self,
        *,
        open_session: Callable[[], PromptSession],
        costs: CostTable,
        lambda_range: Range = DEFAULT_LAMBDA_RANGE,
    ) -> None:
        session = open_session()
        require_costs_of(costs, session.model, session.layers)
        self._layers, self._exits = session.layers, session.exits
        self._tokens = session.prompt_tokens
        prices = costs.at(1)
        self._spared = 1 - prices.fill_s / prices.layer_s
        low = np.full(len(OBJECTIVES), -np.inf, np.float32)
        super().__init__(
            session,
            Actions("gate", len(session.exits)),
            Weights(1, lambda_range, None, knows_energy=False),
            spaces.Box(low, -low, dtype=np.float32),
            OBJECTIVES,
        )

    def _begin(self, moment: Moment) -> None:
        self._vector_V: RewardArray = np.zeros(len(OBJECTIVES), np.float64)
        self._asked = 0

    def _decide(self, here: int, target: int) -> RewardArray:
        self._asked += 1
        skipped = self._layers - self._exits[here] if target == here else 0
        return np.array([0.0, self._share(skipped, self._tokens * self._layers)])

    def _settle(self, moment: Moment, vector_V: RewardArray) -> None:
        if moment.read is not None:
            read = self._read = moment.read
            saved = self._share(read.full_calls - read.calls, read.full_calls)
            vector_V[:] = read.full_loss - read.loss, saved - self._vector_V[1]
        self._vector_V += vector_V

    def _share(self, skipped: int, full: int) -> float:
        return self._spared * skipped / full

    def _totals(self) -> dict[str, Any]:
        quality, saved = self._vector_V.tolist()
        read = self._read
        return {
            "quality": quality,
            "saved": saved,
            "loss": read.loss,
            "full_loss": read.full_loss,
            "calls": read.calls,
            "full_calls": read.full_calls,
            "left": read.left,
            "asked": self._asked,
            "prompt": read.prompt,
        }
