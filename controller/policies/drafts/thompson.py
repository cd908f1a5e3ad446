"""How many tokens to draft, by Thompson sampling.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import MAX_PENDING, FloatArray, IntArray
from offramp.controller.policies.codec import Kind, Params, Tensors
from offramp.controller.policies.drafts.drafter import open_drafts, require_exits, require_length
from offramp.controller.policies.protocols import IndexArray, Verdict
from offramp.controller.strict import COUNT, NUMBER


class ThompsonDraft:
    """Drafts on with a sampled chance of being right, as in EESD.

    Liu et al. 2024, arXiv 2406.03853, section 3.3, the variant with a Beta prior: the chance θ
    that a draft is accepted has the posterior Beta(α, β). Before each draft θ is drawn from it,
    and drafting goes on if a Bernoulli(θ) draw is 1. Verifying k drafts of which the first r are
    right is r successes and, if r < k, one failure: α += r, β += 1; drafts after the first wrong
    one say nothing.

    The first token of a cycle is always drafted: verifying nothing learns nothing. The paper's
    second variant, which calibrates θ by the draft model's confidence, is not here.

    Args:
        layer: Layers executed for a draft.
        alpha, beta: The prior's parameters.
        length: Drafts per cycle at most.
        max_pending: The engine's.
        seed: Seeds the draws.

    Raises:
        RequestError: an argument is out of range.
    """

    schema = None

    def __init__(
        self,
        layer: int,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        length: int = MAX_PENDING,
        max_pending: int = MAX_PENDING,
        seed: int = 0,
    ) -> None:
        self.exits = (layer,)
        require_exits(self.exits)
        require_length(length, max_pending)
        if not (alpha > 0 and beta > 0):
            raise RequestError("alpha, beta", f"({alpha}, {beta}) are not positive")
        self.candidates_VK: IntArray | None = None
        self.alpha, self.beta = alpha, beta
        self.length, self.max_pending, self.seed = length, max_pending, seed
        self.rewind()

    def rewind(self) -> None:
        """Begin the draws anew, from the seed."""
        self._rng = np.random.default_rng(self.seed)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Draft on, or verify now, [N]."""
        drafts_N = open_drafts(outlook_NC, self.max_pending)
        theta_N = self._rng.beta(self.alpha, self.beta, len(drafts_N))
        goes_on_N = self._rng.random(len(drafts_N)) < theta_N
        asks_N = (drafts_N == 0) | ((drafts_N < self.length) & goes_on_N)
        return np.where(asks_N, 0, 1)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Everybody leaves."""
        return np.full(len(features_NF), here, np.int64)

    def learn(self, verdicts: Sequence[Verdict]) -> None:
        """Count the drafts up to the first wrong one."""
        right = leading(verdicts)
        self.alpha += right
        self.beta += right < len(verdicts)


def leading(verdicts: Sequence[Verdict]) -> int:
    """Verdicts up to the first that disagrees."""
    for count, verdict in enumerate(verdicts):
        if not verdict.agreed:
            return count
    return len(verdicts)


def _describe(policy: ThompsonDraft) -> tuple[Params, Tensors]:
    names = ("alpha", "beta", "length", "max_pending", "seed")
    return {name: getattr(policy, name) for name in names}, {}


THOMPSON = Kind(
    name="draft-thompson",
    type=ThompsonDraft,
    params={"alpha": NUMBER, "beta": NUMBER, "length": COUNT, "max_pending": COUNT, "seed": COUNT},
    describe=_describe,
    build=lambda parts: ThompsonDraft(parts.only_exit, **parts.params),
)
