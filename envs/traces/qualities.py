"""How an exit's token is scored: a registry that a user can add to.

A quality is a function of traces that gives [N, E + 1] values in [0, 1]: of leaving each token at
each exit, and, in the last column, of full depth.

>>> import numpy as np
>>> from offramp.envs.traces.qualities import register_quality
>>> def sure_agreement(traces):  # agreement, but worth half where the exit itself was unsure
...     half = np.where(traces.margin_NE < 0.5, 0.5, 1.0)
...     return np.append(half * traces.agree_NE, np.ones((len(traces), 1)), axis=1)
>>> register_quality("sure_agreement", sure_agreement)

Then ``quality="sure_agreement"`` works in every environment. An environment in another process
must register it there, too.

Shape suffixes: N tokens, E1 = exits and full depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import FloatArray

if TYPE_CHECKING:
    from offramp.envs.traces.tokens import TokenTraces

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
    """Add a way to score an exit's token.

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
