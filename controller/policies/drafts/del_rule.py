"""Exit and number of drafts by tokens per layer, anew in each cycle.

Shape suffixes: N rows, E exits, K numbers of drafts, F features, C columns of outlook.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.errors import RequestError
from offramp.controller.features import MAX_PENDING, SOFTMAX_V2, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind, Params, Tensors
from offramp.controller.policies.drafts.drafter import TOP1, open_drafts, require_exits
from offramp.controller.policies.drafts.thompson import leading
from offramp.controller.policies.protocols import IndexArray, Verdict
from offramp.controller.strict import COUNT, NUMBER, list_of

PRIOR_ROUNDS = 8.0
"""Verdicts that the recorded acceptance counts for at the start."""


def tokens_per_layer(
    acceptance_E: NDArray[np.float64], loads_E: ArrayLike, layers: int, most: int
) -> NDArray[np.float64]:
    """TPL(ℓ, d) = (1 − α^(d+1)) / (1 − α) / (d·ℓ + L) for d = 0 … ``most``, [E, K].

    Expected tokens of a cycle of d drafts of a load of ℓ layers each, over the layers it loads
    (DEL, Entezari Zarch et al. 2025, arXiv 2504.05598, section 3).

    >>> tokens_per_layer(np.array([0.5]), (4.0,), 8, 2).round(4).tolist()
    [[0.125, 0.125, 0.1094]]
    """
    drafts_K = np.arange(most + 1)
    alpha_E1 = np.minimum(np.asarray(acceptance_E, np.float64), 1 - 1e-9)[:, None]
    tokens_EK = (1 - alpha_E1 ** (drafts_K + 1)) / (1 - alpha_E1)
    loaded_EK = np.asarray(loads_E, np.float64)[:, None] * drafts_K + layers
    result_EK: NDArray[np.float64] = tokens_EK / loaded_EK
    return result_EK


class DelDraft:
    """DEL's rule (arXiv 2504.05598): in each cycle the exit ℓ and length d of the best TPL.

    α_ℓ is the share of drafts accepted, each cycle's weighing ω times as much as the next one's.
    Drafting stops early below a confidence halfway between the mean top-1 of right and of wrong
    tokens.

    **Approximation.** The paper keeps each token's hidden states at all layers and asks the head
    after a round what every layer would have said ("shadow tokens"), so that α and the threshold
    of every layer are renewed each round, by all tokens. The engine judges only the exit at which
    a token really left. So an exit that is not taken keeps the acceptance that was recorded
    offline until it is taken; and thresholds stay as recorded: renewed by those drafts alone that
    had passed them, they would climb until nothing is drafted. As with Kangaroo's rule here, an
    unsure token is not drafted but goes on to full depth.

    Args:
        exits: Layers ℓ to choose from.
        layers: Number of layers L of the model.
        acceptance: α of each exit at the start, from recorded traces.
        thresholds: Confidence at each exit below which drafting stops, from recorded traces.
        loads: What a draft of each exit costs in layers of the model's own, as measured: a copy's
            layer is less than one, and an adapter layer one more. None counts the exit's layers.
        omega: ω, in (0, 1].
        max_pending: The engine's; the longest draft.

    Raises:
        RequestError: an argument is out of range.
    """

    schema: FeatureSchema = SOFTMAX_V2

    def __init__(
        self,
        exits: tuple[int, ...],
        layers: int,
        acceptance: ArrayLike,
        thresholds: ArrayLike,
        loads: ArrayLike | None = None,
        *,
        omega: float = 0.95,
        max_pending: int = MAX_PENDING,
    ) -> None:
        require_exits(exits)
        self.threshold_E = _shares("thresholds", thresholds, exits)
        self.load_E = np.asarray(exits if loads is None else loads, np.float64)
        if self.load_E.shape != (len(exits),) or not (self.load_E > 0).all():
            raise RequestError("loads", f"{loads!r} is no positive number for each of {exits}")
        if not 0 < omega <= 1:
            raise RequestError("omega", f"{omega} is not in (0, 1]")
        self.exits, self.layers, self.omega, self.max_pending = exits, layers, omega, max_pending
        self.candidates_VK: IntArray | None = None
        self._right_E = _shares("acceptance", acceptance, exits) * PRIOR_ROUNDS
        self._judged_E = np.full(len(exits), PRIOR_ROUNDS)
        self._choose()

    @property
    def acceptance_E(self) -> NDArray[np.float64]:
        """α of each exit as it stands."""
        return np.asarray(self._right_E / self._judged_E)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """The cycle's exit, or E once its length is reached."""
        full_N = open_drafts(outlook_NC, self.max_pending) >= self.length
        return np.where(full_N, len(self.exits), self.exit_index)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Leave if confident, else verify."""
        sure_N = features_NF[:, TOP1] >= self.threshold_E[here]
        return np.where(sure_N, here, len(self.exits))

    def learn(self, verdicts: Sequence[Verdict]) -> None:
        """Judge the drafts up to the first wrong one, and choose for the next cycle."""
        self._right_E *= self.omega
        self._judged_E *= self.omega
        for verdict in verdicts[: leading(verdicts) + 1]:
            self._right_E[verdict.exit_index] += verdict.agreed
            self._judged_E[verdict.exit_index] += 1
        self._choose()

    def _choose(self) -> None:
        gain_EK = tokens_per_layer(self.acceptance_E, self.load_E, self.layers, self.max_pending)
        self.exit_index, self.length = divmod(int(gain_EK.argmax()), gain_EK.shape[1])


def _shares(name: str, values: ArrayLike, exits: tuple[int, ...]) -> NDArray[np.float64]:
    shares_E = np.asarray(values, np.float64)
    if shares_E.shape != (len(exits),) or not ((shares_E >= 0) & (shares_E <= 1)).all():
        raise RequestError(name, f"{values!r} is no share for each of {exits}")
    return shares_E


def _describe(policy: DelDraft) -> tuple[Params, Tensors]:
    return {
        "layers": policy.layers,
        "acceptance": policy.acceptance_E.tolist(),
        "thresholds": policy.threshold_E.tolist(),
        "loads": policy.load_E.tolist(),
        "omega": policy.omega,
        "max_pending": policy.max_pending,
    }, {}


DEL = Kind(
    name="draft-del",
    type=DelDraft,
    params={
        "layers": COUNT,
        "acceptance": list_of(NUMBER),
        "thresholds": list_of(NUMBER),
        "loads": list_of(NUMBER),
        "omega": NUMBER,
        "max_pending": COUNT,
    },
    describe=_describe,
    build=lambda parts: DelDraft(parts.exits, **parts.params),
)
