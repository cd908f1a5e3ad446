"""Whole rollouts, and the policy that records one while an engine serves it.

Shape suffixes: K decisions, T tokens, N rows, D = F + C + 1 observation columns (features,
outlook, log λ), F features, C columns of outlook, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.protocols import IndexArray, Verdict
from offramp.controller.policies.router import MlpRouter

UNKNOWN = -1
"""Marks a token that full depth has not judged."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedRollout:
    """One document, decoded with the exits that one version of the policy chose.

    Attributes:
        version: Version of the policy, the same for every decision of a rollout.
        task: Document and place in the run: reissued under the same number.
        document: SHA-256 of its text.
        preference: λ that was decided under.
        obs_KD: What each decision saw, float32; before the first layer the features are zeros.
        action_K: What it chose: 0 leave, k jump to the k-th exit from here.
        log_prob_K: With what log-probability, float32.
        token_K: Token that it was made for, from 0 on, ascending.
        taken_T: Exit each token left at; E for the end.
        agreed_T: 1 where full depth would have said the same token, else 0, int8; of tokens that
            ran all layers 1, and UNKNOWN where it was not asked.
    """

    version: int
    task: int
    document: str
    preference: float
    obs_KD: FloatArray
    action_K: IndexArray
    log_prob_K: FloatArray
    token_K: IndexArray
    taken_T: IndexArray
    agreed_T: np.ndarray

    @property
    def ends_K(self) -> BoolArray:
        """Whether a decision is its token's last."""
        return np.append(self.token_K[1:] != self.token_K[:-1], True)


@dataclass(slots=True)
class RecordingRouter:
    """Samples from a router's logits and remembers every decision; one per request.

    The engine groups rows by policy object, so this one always sees its own request's row, alone.

    Attributes:
        router: What is sampled from; its start is learned.
        preference: λ that the router was made for; recorded with each observation.
        rng: Draws the actions.
    """

    router: MlpRouter
    preference: float
    rng: np.random.Generator
    _obs: list[FloatArray] = field(default_factory=list)
    _actions: list[int] = field(default_factory=list)
    _log_probs: list[float] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _taken: list[int] = field(default_factory=list)
    _verdicts: list[bool] = field(default_factory=list)

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers that the router may ask after."""
        return self.router.exits

    @property
    def schema(self) -> FeatureSchema:
        """Features that the router reads."""
        return self.router.schema

    @property
    def candidates_VK(self) -> IntArray | None:
        """Candidate table of the router, if it has one."""
        return self.router.candidates_VK

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Draw the first exit of a new token."""
        assert len(outlook_NC) == 1  # one request, one row
        assert len(outlook_NC) == 1  # one request, one row
        self._taken.append(len(self.exits))
        first = self._draw(self.router.start_logits(outlook_NC)[0])
        self._record(np.zeros(self.schema.width, np.float32), outlook_NC[0], first + 1)
        return np.asarray([first])

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Draw whether to leave, or where to be asked next."""
        action = self._draw(self.router.logits(here, features_NF, outlook_NC)[0])
        self._record(features_NF[0], outlook_NC[0], action)
        if action == 0:
            self._taken[-1] = here
        return np.asarray([min(here + action, len(self.exits))])

    def learn(self, verdicts: Sequence[Verdict]) -> None:
        """Remember what full depth said of the early tokens, in their order."""
        self._verdicts += [verdict.agreed for verdict in verdicts]

    def rollout(
        self, *, version: int, task: int, document: str, agreed_T: np.ndarray | None = None
    ) -> DecodedRollout:
        """Everything so far; the labels are the verdicts unless others are given.

        Args:
            version, task, document: See ``DecodedRollout``.
            agreed_T: Labels of all tokens, from elsewhere.
        """
        return DecodedRollout(
            version=version,
            task=task,
            document=document,
            preference=self.preference,
            obs_KD=np.stack(self._obs),
            action_K=np.asarray(self._actions, np.int64),
            log_prob_K=np.asarray(self._log_probs, np.float32),
            token_K=np.asarray(self._tokens, np.int64),
            taken_T=np.asarray(self._taken, np.int64),
            agreed_T=self._judged() if agreed_T is None else agreed_T,
        )

    def _judged(self) -> np.ndarray:
        early = [t for t, taken in enumerate(self._taken) if taken < len(self.exits)]
        agreed_T = np.full(len(self._taken), 1, np.int8)
        agreed_T[early] = UNKNOWN
        for token, agreed in zip(early, self._verdicts, strict=False):
            agreed_T[token] = agreed
        return agreed_T

    def _draw(self, logits_A: FloatArray) -> int:
        """Sample by the Gumbel-max trick, and note the log-probability."""
        action = int((logits_A + self.rng.gumbel(size=logits_A.size)).argmax())
        chance_A = np.exp(logits_A.astype(np.float64) - logits_A.max())
        self._log_probs.append(math.log(chance_A[action] / chance_A.sum()))
        return action

    def _record(self, features_F: FloatArray, outlook_C: FloatArray, action: int) -> None:
        preference_1 = np.asarray([math.log(self.preference)], np.float32)
        self._obs.append(np.concatenate([features_F, outlook_C, preference_1]))
        self._actions.append(action)
        self._tokens.append(len(self._taken) - 1)
