"""Feature schemas: the columns a probe computes and a policy reads, by name and version."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """The ordered float32 columns of one kind of probe.

    Attributes:
        name: Names the probe that computes the columns.
        version: Raised whenever a column's meaning changes.
        columns: Column names, in order.
        digest: SHA-256 of name, version and columns: equal only if probe and policy agree.
    """

    name: str
    version: int
    columns: tuple[str, ...]
    # A field, because the decode loop looks probes up by it.
    digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        text = json.dumps([self.name, self.version, list(self.columns)])
        digest = hashlib.sha256(text.encode()).hexdigest()
        object.__setattr__(self, "digest", digest)  # how a frozen dataclass sets a derived field

    @property
    def width(self) -> int:
        """Number of columns F."""
        return len(self.columns)

    def index(self, column: str) -> int:
        """Position of a column.

        Raises:
            ValueError: the schema has no such column.
        """
        return self.columns.index(column)


CANDIDATES_V1 = FeatureSchema(
    name="candidates",
    version=1,
    columns=(
        "top1",  # softmax over the candidates: probability of the best, in [0, 1]
        "margin",  # best minus second best probability, in [0, 1]
        "entropy",  # of that softmax, divided by ln k, in [0, 1]
        "top_logit",  # raw score of the best candidate / 10
        "cosine",  # of this hidden state to the one at the last probe, in [-1, 1]
        "norm_change",  # ln(|h| / |h at the last probe|)
        "agrees",  # 1 if the best candidate is the one of the last probe, else 0
        "run_length",  # probes in a row with the same best candidate / number of exits, in [0, 1]
        "top1_change",  # top1 minus top1 at the last probe (0 at the first)
        "depth",  # layer / number of layers, in (0, 1)
        "position",  # token position / context length, in [0, 1]
    ),
)
"""Logit-free and candidate features: never touch the whole LM head."""

SOFTMAX_V2 = FeatureSchema(
    name="softmax",
    version=2,
    columns=(
        "top1",  # softmax over the whole vocabulary: probability of the best, in [0, 1]
        "margin",  # best minus second best probability, in [0, 1]
        "entropy",  # of that softmax, divided by ln V, in [0, 1]
        "agrees",  # 1 if the best token is the one of the last probe, else 0
        "run_length",  # probes in a row with the same best token / number of exits, in [0, 1]
        "depth",  # layer / number of layers, in (0, 1)
        "position",  # token position / context length, in [0, 1]
    ),
)
"""Full-vocabulary confidence (CALM, Schuster et al. 2022, section 3.3): one LM head per probe."""

SKETCH_V1 = FeatureSchema(
    name="sketch",
    version=1,
    columns=(
        "top1",  # softmax over the sketched tokens: probability of the best, in [0, 1]
        "margin",  # best minus second best probability, in [0, 1]
        "entropy",  # of that softmax, divided by ln m, in [0, 1]
        "top_logit",  # approximate score of the best sketched token / 10
        "agrees",  # 1 if the best token is the one of the last probe, else 0
        "run_length",  # probes in a row with the same best token / number of exits, in [0, 1]
        "top1_change",  # top1 minus top1 at the last probe (0 at the first)
        "depth",  # layer / number of layers, in (0, 1)
        "position",  # token position / context length, in [0, 1]
    ),
)
"""Scores of the m most frequent tokens through a factorisation of low rank of their head rows."""

STATE_V1 = FeatureSchema(
    name="state",
    version=1,
    columns=(
        "cosine",  # of this hidden state to the one at the last probe, in [-1, 1]
        "norm_change",  # ln(|h| / |h at the last probe|)
        "update",  # |h - h at the last probe| / |h|
        "update_cosine",  # of this update to the one before, in [-1, 1] (0 at the first)
        "mean",  # mean of h / root mean square of h, in [-1, 1]
        "log_rms",  # ln(root mean square of h)
        "peak",  # ln(largest |h_i| / root mean square of h), at least 0
        "depth",  # layer / number of layers, in (0, 1)
        "position",  # token position / context length, in [0, 1]
    ),
)
"""Statistics of the hidden state alone: no logit, no matrix."""

PROMPT_V1 = FeatureSchema(
    name="prompt",
    version=1,
    columns=(
        "cosine",  # of this hidden state to the one at the exit before (embedding), in [-1, 1]
        "norm_change",  # ln(|h| / |h at the exit before|)
        "update",  # |h - h at the exit before| / |h|
        "log_rms",  # ln(root mean square of h)
        "peak",  # ln(largest |h_i| / root mean square of h), at least 0
        "seen",  # 1 if the token occurred earlier in the prompt, else 0
        "pair_seen",  # 1 if it occurred there behind the same token, else 0
        "place",  # position / 256, exact in float32
        "ahead",  # tokens between it and the prompt's last / 256
        "depth",  # layer / number of layers, in (0, 1)
    ),
)
"""Of a token of a prompt that is being read: its state alone, how new it is, and where it stands.
Policies for prompts read it; none that decides about new tokens does."""

OUTLOOK_V1 = FeatureSchema(
    name="outlook",
    version=1,
    columns=(
        "step",  # tokens emitted or drafted so far in this completion / 256, at least 0
        "left",  # tokens it may still emit / 256, at least 0
        "pending",  # tokens postponed since it last ran all layers / the most allowed, in [0, 1]
        "debt",  # moving average (0.9) of the share of layers its tokens skipped, in [0, 1]
        "acceptance",  # moving average (0.9) of early tokens full depth agreed with, in [0, 1]
        "last_depth",  # layers of its last token / number of layers, in (0, 1]
        "active",  # rows running / slots, in (0, 1]
        "waiting",  # requests in line / slots, in [0, 8]
    ),
)
"""What the engine knows of a row without any probe; read by routing policies beside a probe."""

MAX_PENDING = 8
"""Pending tokens of a row by default at most: tokens postponed in ``defer``, drafts in ``verify``.
The outlook's ``pending`` is a share of it."""

KEEP = 0.9
"""Share of the outlook's moving averages that outlives one token."""


@lru_cache(maxsize=16)
def hidden_schema(width: int) -> FeatureSchema:
    """The hidden state itself, ``width`` columns: what norm and head read at an exit.

    For agents that observe the state as GREEN-CODE does (Ilager et al. 2025). One schema per
    model width, so it is not in SCHEMAS; ``schema_of`` knows it.
    """
    return FeatureSchema(
        name="hidden", version=1, columns=tuple(f"h{column}" for column in range(width))
    )


def schema_of(digest: str, width: int) -> FeatureSchema | None:
    """The schema of a digest: of SCHEMAS, PROMPT_V1, or the hidden state of that width, or None."""
    others = {each.digest: each for each in (hidden_schema(width), PROMPT_V1)}
    return others.get(digest) or SCHEMAS.get(digest)


SCHEMAS: dict[str, FeatureSchema] = {
    schema.digest: schema for schema in (CANDIDATES_V1, SOFTMAX_V2, SKETCH_V1, STATE_V1)
}
"""Every schema that is computed of new tokens, by digest."""

TABLE_SCHEMAS = frozenset({CANDIDATES_V1.digest, SKETCH_V1.digest})
"""Digests of the schemas whose probes need the policy's candidate table."""
