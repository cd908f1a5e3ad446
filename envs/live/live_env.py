"""A sequence that a real engine decodes. The class docstring is the specification.

Shape suffixes: D observation columns, O objectives that cost, V objectives of a reward vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import OUTLOOK_V1
from offramp.envs.adapters.spaces import reward_box
from offramp.envs.charges.pending import TokenMeter
from offramp.envs.charges.token_costs import costs_for
from offramp.envs.charges.tradeoffs import DEFAULT_LAMBDA_RANGE, Range, Weights
from offramp.envs.cores.batch import RewardArray
from offramp.envs.cores.walk import ActionKind, Actions
from offramp.envs.live.session import LiveSession, LiveToken, Moment
from offramp.envs.live.session_env import SessionEnv

LIVE_QUALITIES = ("agreement", "label")
"""What a live token is scored by: is it full depth's, or the document's own."""


class LiveExitEnv(SessionEnv):
    """Decode a document with a real engine: the exits taken change the cache it goes on with.

    The counterpart of ``SequenceExitEnv`` without its model of debt: same observation, actions and
    reward, so that one policy runs in both. Use it to collect on-policy data and to evaluate; a
    step takes as long as the layers it runs.

    ## Observation

    ``Box(float32)`` of F + 8 + 1 columns as of ``SequenceExitEnv``: the features that the engine's
    probe computed at the present exit (compared to the exit really probed before), the engine's
    own outlook, log λ; with ``energy_range`` also log μ. Before the first layer features are 0.

    ## Action

    ``Discrete``, as of ``TokenExitEnv``: ``gate`` or ``jump``. Whether the first question comes
    before the first layer is up to the session.

    ## Reward

    As of ``SequenceExitEnv``, with what really came out: the document is fed token by token
    (teacher forcing), so full depth's token after the same history is known. ``agreement``: 1 if
    the emitted token is full depth's with an exact cache, else 0, of full depth with a worn cache,
    too. ``label``: 1 if it is the document's next one. Costs are *priced* by the cost table, not
    timed: rewards do not depend on the machine's mood, and equal seeds give equal rewards.

    ## Start

    With a document drawn by the session and λ (μ) drawn log-uniformly;
    ``reset(options={"lambda": value, "mu": value})`` sets them.

    ## End

    ``terminated`` after the sequence's last token. Never truncated.

    ## Info

    - each step: ``reward_vector``; of jumps, ``action_mask``, but for the last step.
    - at the end, as of ``SequenceExitEnv``: ``quality``, ``cost``, ``energy``, ``exit_layer``,
      ``probes``, ``agree`` (means over tokens), ``tokens``, ``unasked``, ``lambda``, ``mu``.

    ## Arguments

    - ``open_session``: gives the ``LiveSession``; it is closed with the environment.
    - ``costs``: measured ``CostTable`` of the session's model.
    - ``pending_share``: as of ``SequenceExitEnv``, for sessions in ``defer`` mode.
    - ``quality``: ``agreement`` or ``label``.
    - ``lambda_range``, ``energy_range``, ``actions``, ``jumps``, ``ends``: as of ``TokenExitEnv``.

    Raises ``ConfigError`` for an unusable argument, option or action, ``ResetNeeded`` for a step
    outside an episode, and whatever the session raises.

    ## Example

    A session can be anything that decodes; here, two tokens that are right at any exit.

    >>> import gymnasium as gym, numpy as np, offramp.envs
    >>> from offramp.controller.costs.table import CostTable
    >>> from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1
    >>> from offramp.envs.live.session import LiveToken, Moment, Question
    >>> class Two:
    ...     model, exits, layers, schema = "m", (2, 4), 8, CANDIDATES_V1
    ...     kv_mode, max_pending, asks_first, adapters = "project", 8, False, ()
    ...     def begin(self, rng):
    ...         self.left, self.here = 2, 0
    ...         return Moment((), self.ask())
    ...     def ask(self):
    ...         columns = (np.zeros(each.width, np.float32) for each in (CANDIDATES_V1, OUTLOOK_V1))
    ...         return Question(self.here, *columns)
    ...     def answer(self, target):
    ...         if self.here < target < 2:
    ...             self.here = target
    ...             return Moment((), self.ask())
    ...         self.left, self.here = self.left - 1, 0
    ...         return Moment((LiveToken(target, 5, 5, 5),), self.ask() if self.left else None)
    ...     def close(self):
    ...         pass
    >>> costs = CostTable(layer_s=1.0, head_s=2.0, probe_s=0.0, policy_s=0.0, fill_s=0.0,
    ...                   step_s=0.0, layers=8, machine="example")
    >>> env = gym.make("offramp/LiveExit-v0", open_session=Two, costs=costs, lambda_range=(1, 1))
    >>> obs, info = env.reset(seed=0)
    >>> obs, reward, terminated, truncated, info = env.step(0)  # leave after layer 2 of 8
    >>> round(float(reward), 3), terminated
    (0.3, False)
    >>> obs, reward, terminated, truncated, info = env.step(2)  # all layers
    >>> round(float(reward), 3), terminated, info["exit_layer"]
    (0.0, True, 5.0)
    >>> env.close()

    ## Version history

    - v0: first version.
    """

    def __init__(
        self,
        *,
        open_session: Callable[[], LiveSession],
        costs: CostTable,
        pending_share: float | None = None,
        lambda_range: Range = DEFAULT_LAMBDA_RANGE,
        quality: str = "agreement",
        actions: ActionKind = "jump",
        jumps: int | None = None,
        ends: bool = False,
        energy_range: Range | None = None,
    ) -> None:
        if quality not in LIVE_QUALITIES:
            known = " or ".join(LIVE_QUALITIES)
            raise ConfigError("quality", f"{quality!r} is unknown here", f"Use {known}")
        session = open_session()
        self._meter = TokenMeter(
            costs_for(costs, session.model, session.layers, session.schema.name),
            session.exits,
            session.layers,
            pending_share=pending_share,
            max_pending=session.max_pending if session.kv_mode == "defer" else None,
            adapters=session.adapters,
        )
        objectives = self._meter.objectives
        super().__init__(
            session,
            Actions(actions, len(session.exits), jumps, session.asks_first, ends),
            Weights(1, lambda_range, energy_range, "energy" in objectives),
            reward_box(objectives),
            objectives,
            outlook=OUTLOOK_V1.width,
        )
        self._quality = quality

    def _begin(self, moment: Moment) -> None:
        self._sums = _Sums(len(self.objectives))
        self._meter.begin()
        self._come_out(moment.tokens, np.zeros(len(self.objectives)))

    def _decide(self, here: int, target: int) -> RewardArray:
        vector_V = np.zeros(len(self.objectives), np.float64)
        vector_V[1:] = -self._meter.decide(here, target)
        return vector_V

    def _settle(self, moment: Moment, vector_V: RewardArray) -> None:
        self._come_out(moment.tokens, vector_V, is_asked=True)
        self._sums.vector_V += vector_V

    def _totals(self) -> dict[str, Any]:
        return self._sums.info(self.objectives)

    def _come_out(
        self, tokens: tuple[LiveToken, ...], vector_V: RewardArray, is_asked: bool = False
    ) -> None:
        """Add what tokens earn to the vector; all but the first were decided by nobody."""
        for token in tokens:
            vector_V[0] += self._worth(token)
            if not is_asked:
                vector_V[1:] -= self._meter.unasked()
            self._sums.add(token, self._meter.layer(token.column), self._meter.probes, is_asked)
            self._meter.end(token.column)
            is_asked = False

    def _worth(self, token: LiveToken) -> bool:
        goal = token.full if self._quality == "agreement" else token.following
        return token.emitted == goal


class _Sums:
    """Sums over an episode's tokens."""

    def __init__(self, objectives: int) -> None:
        self.vector_V = np.zeros(objectives, np.float64)
        self.layers = self.agree = self.probes = self.unasked = self.tokens = 0

    def add(self, token: LiveToken, layer: int, probes: int, is_asked: bool) -> None:
        self.tokens += 1
        self.layers += layer
        self.agree += token.emitted == token.full
        self.probes += probes
        self.unasked += not is_asked

    def info(self, objectives: tuple[str, ...]) -> dict[str, Any]:
        sums = {"exit_layer": self.layers, "probes": self.probes, "agree": self.agree}
        means_V = (self.vector_V / self.tokens).tolist()
        names = ("quality", "cost", "energy")[: len(objectives)]
        signed = [means_V[0], *(-mean for mean in means_V[1:])]
        info: dict[str, Any] = dict(zip(names, signed, strict=True))
        info |= {name: total / self.tokens for name, total in sums.items()}
        return info | {"tokens": self.tokens, "unasked": self.unasked}
