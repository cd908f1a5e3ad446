"""Exit policies: who may leave, after which layer.

Shape suffixes: N rows asked at once, F feature columns, V vocabulary, K candidates per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray

IndexArray = NDArray[np.int64]
"""Places, counts."""


class PolicyInputs(Protocol):
    """Where a policy is asked, and what it reads there.

    Attributes:
        exits: Numbers of executed layers after which to ask, ascending; () never asks. In
            ``verify`` some may be ``Exit`` values on a copy in fewer bytes, which come first.
        schema: The features it reads; None if it reads none.
        candidates_VK: For the candidate probe: likely next tokens of each token; else None.
    """

    @property
    def exits(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def schema(self) -> FeatureSchema | None: ...  # noqa: D102

    @property
    def candidates_VK(self) -> IntArray | None: ...  # noqa: D102


@runtime_checkable
class ExitPolicy(PolicyInputs, Protocol):
    """Decides, after each of its exits, which rows leave."""

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Which of the N rows leave here. The result may be a view that the next call reuses."""
        ...


@runtime_checkable
class RoutingPolicy(PolicyInputs, Protocol):
    """Decides, at each exit where a row is asked, at which exit it is asked next, if at all.

    So it can skip probes (jump), and give up asking before the first layer. C columns of outlook
    are those of OUTLOOK_V1; E = len(exits).
    """

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Before the first layer: index of the exit each row is first asked at; E for none, [N].

        With E a token runs all layers, and what its row had left pending goes along: in ``verify``
        this is the action "verify now".
        """
        ...

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """After the exit with index ``here``, [N]: ``here`` leaves, a higher index is asked next.

        E runs all layers unasked.
        """
        ...


@runtime_checkable
class HeadlessPolicy(Protocol):
    """A routing policy of CANDIDATES_V1 that drafts the best candidate, which takes no head.

    In ``verify`` a draft may be any token. Greedy requests there draft so; all others take the
    token from the head, as they do under any policy.

    Attributes:
        headless: Whether it does.
    """

    @property
    def headless(self) -> bool: ...  # noqa: D102


class Seen(NamedTuple):
    """What rows are known by at an exit, beside what its probe computed.

    Attributes:
        read_N: Token that each row read last, the one whose state it is; −1 if unknown.
        state_ND: What norm and head read, float32.
    """

    read_N: IntArray
    state_ND: FloatArray


Policy = ExitPolicy | RoutingPolicy
"""What a request can be pinned to."""


def is_headless(policy: object) -> bool:
    """Whether a policy drafts the best candidate."""
    return isinstance(policy, HeadlessPolicy) and policy.headless


def reads_state(policy: object) -> bool:
    """Whether a routing policy reads states, too: its ``reads_state``, if it has one.

    ``route`` of such a policy also takes ``seen``. It is asked for every token, and to look whether
    an object has a protocol's methods takes longer than a decision.
    """
    return bool(getattr(policy, "reads_state", False))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What full depth says of one token that had left early.

    Attributes:
        exit_index: Index into the policy's exits of where it left.
        features_F: What was probed there; empty without a schema.
        agreed: Whether full depth's most likely token is the one that was emitted or drafted.
    """

    exit_index: int
    features_F: FloatArray
    agreed: bool


@runtime_checkable
class LearningPolicy(Protocol):
    """A policy that also learns while it serves (bandits, adaptive thresholds).

    Only ``defer`` and ``verify`` give verdicts. One request's policy object may serve others of
    the same engine, on its one thread.
    """

    def learn(self, verdicts: Sequence[Verdict]) -> None:
        """Told after each deep pass of a row: its early tokens since the last, oldest first."""
        ...


@runtime_checkable
class StatefulPolicy(Protocol):
    """A policy whose own decisions change the next ones: it draws random numbers, or counts."""

    def rewind(self) -> None:
        """Forget them: decide as when it was made."""
        ...


@dataclass(frozen=True, slots=True)
class NeverExit:
    """Full depth for every token: the baseline, and the fallback whenever in doubt."""

    exits: tuple[int, ...] = ()
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Nobody leaves."""
        return np.zeros(len(features_NF), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class FixedExit:
    """Every token leaves after the same layer (the static baseline of every exit paper).

    Attributes:
        layer: Number of executed layers, at least 1.
    """

    layer: int
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        given: object = self.layer  # callers need not keep to the annotation
        if isinstance(given, bool) or not isinstance(given, Integral):
            raise RequestError("layer", f"{self.layer!r} is no number of layers", "Name a layer")
        if self.layer < 1:
            raise RequestError("layer", f"{self.layer} is below 1", "Name a layer from 1 on")

    @property
    def exits(self) -> tuple[int, ...]:
        """The one exit."""
        return (self.layer,)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Everybody leaves."""
        return np.ones(len(features_NF), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """Leave when one feature reaches a threshold.

    With SOFTMAX_V2 and column ``margin`` this is CALM's softmax measure (Schuster et al. 2022,
    section 3.3) with a constant threshold.

    Attributes:
        exits: Layers to ask after, ascending.
        schema: The schema that holds the column.
        column: The feature compared.
        threshold: Leave if the feature is at least this.
        candidates_VK: Needed by the candidate probe only.
    """

    exits: tuple[int, ...]
    schema: FeatureSchema
    column: str
    threshold: float
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        require_column(self.schema, self.column)
        require_threshold(self.threshold)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose column is at least the threshold."""
        column_N = features_NF[:, self.schema.index(self.column)]
        return np.asarray(column_N >= self.threshold)


def require_column(schema: FeatureSchema, column: str) -> None:
    """Refuse a column that the schema does not have.

    Raises:
        RequestError: naming the columns there are.
    """
    if column not in schema.columns:
        raise RequestError(
            "column",
            f"schema {schema.name!r} has no column {column!r}",
            f"Choose one of {', '.join(schema.columns)}",
        )


def require_threshold(threshold: float) -> None:
    """Refuse what no feature can be compared with.

    Raises:
        RequestError: it is no number, or NaN.
    """
    given: object = threshold  # callers need not keep to the annotation
    if not isinstance(given, Real):
        raise RequestError("threshold", f"{threshold!r} is no number", "Give one")
    if math.isnan(threshold):
        problem = "is nan, which no feature is above or below"
        raise RequestError("threshold", problem, "Give a number, or inf to leave nowhere")
