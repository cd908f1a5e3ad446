"""Recorded tokens in memory: what an episode is replayed from, and how an exit's token is scored.

A quality is a function of traces that gives [N, E + 1] values in [0, 1]: of leaving each token at
each exit, and, in the last column, of full depth. ``register_quality`` adds one.

Shape suffixes: N tokens, E exits, F feature columns, S softmax columns, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import FloatArray, IntArray
from offramp.controller.traces import SOFTMAX_COLUMNS, HalfArray, TraceChunk, TraceHeader


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTraces:
    """Tokens decoded at full depth, with what each exit would have said.

    Attributes:
        header: Model, feature schema, exits and layers the tokens were recorded with.
        features_NEF: Candidate features at each exit, float32.
        softmax_NES: Full-vocabulary top1, top1 − top2 and entropy / ln V at each exit, float32.
        exit_token_NE: Token the model would emit at each exit, int32.
        agree_NE: 1 where the exit's token is the full-depth token, else 0, float32.
        gap_NE: Full-depth log-probability of the exit's token minus that of the full-depth
            token, nats ≤ 0, float32.
        right_NE: 1 where the exit's token really follows in the document, else 0, float32.
        full_right_N: 1 where the full-depth token really follows, else 0, float32.
        position_N: Position of each token in its recorded window, from 0 on, int32.
        document_N: Index into ``documents`` of each token's document, int32.
        documents: SHA-256 of each document's text.
        state_NED: What norm and head read at each exit, float16; None if not recorded.
        read_N: Token that was read at each place, int32; −1 of a chunk's first; None if unknown.

    Raises:
        TraceError: there is no token, or an array's shape is not the header's.
    """

    header: TraceHeader
    features_NEF: FloatArray
    softmax_NES: FloatArray
    exit_token_NE: IntArray
    agree_NE: FloatArray
    gap_NE: FloatArray
    right_NE: FloatArray
    full_right_N: FloatArray
    position_N: IntArray
    document_N: IntArray
    documents: tuple[str, ...]
    state_NED: HalfArray | None = None
    read_N: IntArray | None = None

    def __post_init__(self) -> None:
        shape = (len(self.document_N), len(self.header.exits))
        if 0 in shape:
            raise TraceError("traces", f"hold {shape[0]} tokens with {shape[1]} exits")
        for name in ("exit_token_NE", "agree_NE", "gap_NE", "right_NE"):
            _check_shape(name, getattr(self, name).shape, shape)
        for name in ("full_right_N", "position_N"):
            _check_shape(name, getattr(self, name).shape, shape[:1])
        _check_shape("softmax_NES", self.softmax_NES.shape, (*shape, len(SOFTMAX_COLUMNS)))
        _check_shape("features_NEF", self.features_NEF.shape[:2], shape)
        if self.state_NED is not None:
            _check_shape("state_NED", self.state_NED.shape[:2], shape)

    def __len__(self) -> int:
        return len(self.document_N)

    @property
    def margin_NE(self) -> FloatArray:
        """Full-vocabulary top1 − top2 probability at each exit."""
        return self.softmax_NES[:, :, SOFTMAX_COLUMNS.index("margin")]

    @classmethod
    def from_chunks(cls, header: TraceHeader, chunks: Iterable[TraceChunk]) -> TokenTraces:
        """Join chunks in the order given; chunks of one document share its index.

        Raises:
            TraceError: there is no token, or a chunk has another number of exits or features.
        """
        parts = [chunk for chunk in chunks if len(chunk)]
        if not parts:
            raise TraceError("chunks", "hold no token", "Record some documents first")
        if len({part.features_TEF.shape[1:] for part in parts}) > 1:
            raise TraceError(
                "chunks", "differ in exits or features", "Read one recording at a time"
            )
        index = {name: i for i, name in enumerate(dict.fromkeys(part.document for part in parts))}
        exit_token_NE = np.concatenate([part.exit_token_TE for part in parts])
        full_token_N = np.concatenate([part.full_token_T for part in parts])
        next_token_N = np.concatenate([part.next_token_T for part in parts])
        return cls(
            header=header,
            features_NEF=np.concatenate([part.features_TEF for part in parts]),
            softmax_NES=np.concatenate([part.softmax_TES for part in parts]),
            exit_token_NE=exit_token_NE,
            agree_NE=(exit_token_NE == full_token_N[:, None]).astype(np.float32),
            gap_NE=np.concatenate([part.gap_TE for part in parts]),
            right_NE=(exit_token_NE == next_token_N[:, None]).astype(np.float32),
            full_right_N=(full_token_N == next_token_N).astype(np.float32),
            position_N=np.concatenate([part.position_T for part in parts]),
            document_N=np.repeat(
                np.array([index[part.document] for part in parts], np.int32),
                [len(part) for part in parts],
            ),
            documents=tuple(index),
            state_NED=_states(parts),
            read_N=np.concatenate([_read(part) for part in parts]),
        )

    def select(self, documents: Collection[str]) -> TokenTraces:
        """The tokens of these documents only, in their old order.

        Raises:
            TraceError: a document is not in these traces, or none is named.
        """
        unknown = set(documents) - set(self.documents)
        if unknown:
            raise TraceError("documents", f"{min(unknown)[:12]!r} is not in these traces")
        kept = [i for i, name in enumerate(self.documents) if name in set(documents)]
        new_index = np.full(len(self.documents), -1, np.int32)
        new_index[kept] = np.arange(len(kept), dtype=np.int32)
        document_N = new_index[self.document_N]
        rows = document_N >= 0
        names = (each.name for each in fields(self))
        arrays = {name: getattr(self, name) for name in names}
        kept_rows: dict[str, Any] = {
            name: array[rows] for name, array in arrays.items() if isinstance(array, np.ndarray)
        }
        return replace(
            self,
            **kept_rows | {"document_N": document_N[rows]},
            documents=tuple(self.documents[i] for i in kept),
        )

    def quality(self, kind: Quality) -> FloatArray:
        """Quality in [0, 1] of leaving at each exit, and of full depth; [N, E + 1].

        Raises:
            ConfigError: there is no such kind (``offramp.envs.traces.tokens`` has them).
            TraceError: a registered one gave unusable values.
        """
        return score(kind, self)


def _read(part: TraceChunk) -> IntArray:
    return np.concatenate([np.full(1, -1, np.int32), part.next_token_T[:-1]])


def _states(parts: list[TraceChunk]) -> HalfArray | None:
    states = [part.state_TED for part in parts if part.state_TED is not None]
    if not states:
        return None
    if len(states) < len(parts):
        raise TraceError("chunks", "hold hidden states only in part", "Record all with states")
    return np.concatenate(states)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise TraceError(name, f"has shape {found}, not {expected}")


Quality = str
"""Name of a registered quality."""

QualityFunction = Callable[["TokenTraces"], NDArray[Any]]

GAP_FLOOR_NATS = 5.0
"""Log-probability gaps beyond this count as worst: e⁻⁵ is 0.7 % of the best token's chance."""


def agreement(traces: TokenTraces) -> NDArray[Any]:
    """1 if the exit's token is the full-depth token, else 0; full depth 1."""
    return _with_full(traces.agree_NE, np.ones(len(traces), np.float32))


def logprob_gap(traces: TokenTraces) -> NDArray[Any]:
    """1 + clip(gap, −c, 0) / c with c = 5 nats; full depth 1."""
    floor = np.float32(GAP_FLOOR_NATS)
    return _with_full(1 + np.clip(traces.gap_NE, -floor, 0) / floor, np.ones(len(traces)))


def label(traces: TokenTraces) -> NDArray[Any]:
    """1 if the token really follows in the document, else 0; of full depth likewise.

    So an exit that is right where full depth is wrong earns more than full depth.
    """
    return _with_full(traces.right_NE, traces.full_right_N)


_REGISTRY: dict[Quality, QualityFunction] = {
    "agreement": agreement,
    "logprob_gap": logprob_gap,
    "label": label,
}


def quality_names() -> tuple[Quality, ...]:
    """Names of the registered qualities."""
    return tuple(_REGISTRY)


def register_quality(name: Quality, function: QualityFunction) -> None:
    """Add a way to score an exit's token; in another process, register it there, too.

    >>> def sure_agreement(traces):  # agreement, but worth half where the exit itself was unsure
    ...     half = np.where(traces.margin_NE < 0.5, 0.5, 1.0)
    ...     return np.append(half * traces.agree_NE, np.ones((len(traces), 1)), axis=1)
    >>> register_quality("sure_agreement", sure_agreement)

    Then ``quality="sure_agreement"`` works in every environment.

    Args:
        name: Name of the quality.
        function: Gives the values of traces, [N, E + 1].

    Raises:
        ConfigError: the name is taken by another function.
    """
    if _REGISTRY.setdefault(name, function) is not function:
        raise ConfigError("quality", f"{name!r} is taken", "Choose another name")


def score(name: Quality, traces: TokenTraces) -> FloatArray:
    """The quality of leaving at each exit and of full depth, float32 [N, E1].

    Raises:
        ConfigError: there is no such quality.
        TraceError: it gave another shape, or values that are NaN or outside of [0, 1].
    """
    if name not in _REGISTRY:
        raise ConfigError("quality", f"{name!r} is unknown", f"Use {' or '.join(_REGISTRY)}")
    quality_NE1 = np.asarray(_REGISTRY[name](traces), np.float32)
    expected = (len(traces), len(traces.header.exits) + 1)
    if quality_NE1.shape != expected:
        raise TraceError(
            "quality",
            f"{name!r} gave shape {quality_NE1.shape}, not {expected}",
            "Give a column per exit and one for full depth",
        )
    if not ((quality_NE1 >= 0) & (quality_NE1 <= 1)).all():
        raise TraceError("quality", f"{name!r} leaves [0, 1] or is NaN", "Scale and clip it")
    return quality_NE1


def _with_full(exits_NE: NDArray[Any], full_N: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([exits_NE, full_N[:, None]], axis=1)
