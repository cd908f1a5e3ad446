"""P-values of the hypothesis "the risk exceeds delta", from losses in [0, 1].

Each is valid: were the risk above delta, p ≤ ε would come up with probability at most ε, for every
ε at once. They want independent draws, and say how many losses are one draw (see ``losses``).

Shape suffix: N independent units.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.release.certificate import Method

Losses = NDArray[np.float64]
PValue = Callable[[Losses, float], float]

BET_SHARE = 0.9
"""Share taken of the largest bet that cannot lose all; below 1, so that a loss of 1 is survived."""


def binomial_cdf(successes: int, trials: int, chance: float) -> float:
    """P(Binomial(trials, chance) ≤ successes), chance in (0, 1).

    >>> round(binomial_cdf(1, 3, 0.5), 12)
    0.5
    """
    if successes < 0:
        return 0.0
    if successes >= trials:
        return 1.0
    k = np.arange(1, successes + 1, dtype=np.float64)
    # Each term from the one before it: C(n, k) / C(n, k - 1) = (n - k + 1) / k.
    ratios = np.log((trials - k + 1) / k) + math.log(chance / (1 - chance))
    terms = trials * math.log1p(-chance) + np.concatenate([[0.0], np.cumsum(ratios)])
    top = float(terms.max())
    return min(1.0, math.exp(top) * float(np.exp(terms - top).sum()))


def binomial(losses_N: Losses, delta: float) -> float:
    """P(Binomial(N, delta) ≤ Σ loss): exact for 0/1 losses (Angelopoulos et al. 2021, LTT, §2.1).

    Raises:
        ConfigError: a loss is neither 0 nor 1.
    """
    if not np.isin(losses_N, (0.0, 1.0)).all():
        raise ConfigError(
            "method",
            "binomial is for losses of 0 or 1, not for means",
            "Use hoeffding-bentkus, or tokens as units",
        )
    return binomial_cdf(int(losses_N.sum()), len(losses_N), delta)


def hoeffding_bentkus(losses_N: Losses, delta: float) -> float:
    """For any losses in [0, 1]: the better of Hoeffding's and Bentkus' bound.

    p = min(exp(−N·h₁(min(R̂, δ), δ)), e·P(Binomial(N, δ) ≤ ⌈N·R̂⌉)) with
    h₁(a, b) = a ln(a/b) + (1−a) ln((1−a)/(1−b)) (Bates et al. 2021, §3.1; LTT, proposition 2).
    """
    count, mean = len(losses_N), float(losses_N.mean())
    hoeffding = math.exp(-count * _relative_entropy(min(mean, delta), delta))
    # The sum as it is added up may lie a rounding above a whole number.
    total = math.ceil(float(losses_N.sum()) - 1e-9)
    return min(1.0, hoeffding, math.e * binomial_cdf(total, count, delta))


def _relative_entropy(a: float, b: float) -> float:
    """Relative entropy of two coins, nats; 0 ln 0 counts as 0."""
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second


def betting(losses_N: Losses, delta: float) -> float:
    """For any losses in [0, 1]; small where they vary little, as means of documents do.

    A gambler bets that losses stay below delta: wealth K_t = Π_{i ≤ t} (1 − ν_i (L_i − δ)), each
    stake ν_i set by the losses before it. Were the risk above delta, K would be a supermartingale
    that starts at 1, so p = 1 / max_t K_t is valid (Ville; Waudby-Smith & Ramdas 2024, §4; as a
    bound on risk: Bates et al. 2021, §3.1.3). Stakes are their aGRAPA,
    ν = (δ − μ̂) / (σ̂² + (δ − μ̂)²), kept within [0, BET_SHARE / (1 − δ)], with a prior of one loss
    δ/2. It reads the losses in their order, which must not depend on them.
    """
    seen = np.arange(1, len(losses_N) + 1)
    mean_N = (delta / 2 + np.cumsum(losses_N)) / (1 + seen)
    spread_N = (delta**2 / 4 + np.cumsum((losses_N - mean_N) ** 2)) / (1 + seen)
    before_N = np.concatenate([[delta / 2], mean_N[:-1]])
    variance_N = np.concatenate([[delta**2 / 4], spread_N[:-1]])
    edge_N = delta - before_N
    stake_N = np.clip(edge_N / (variance_N + edge_N**2), 0, BET_SHARE / (1 - delta))
    wealth_N = np.cumsum(np.log1p(-stake_N * (losses_N - delta)))
    return min(1.0, math.exp(-float(wealth_N.max())))


P_VALUES: dict[Method, PValue] = {
    "binomial": binomial,
    "hoeffding-bentkus": hoeffding_bentkus,
    "betting": betting,
}
"""Each p-value by its name in certificates."""


def require_losses(losses_N: Losses) -> None:
    """Refuse what no bound holds for.

    Raises:
        TraceError: there is no loss, or one lies outside [0, 1].
    """
    if not losses_N.size:
        raise TraceError("calibration data", "hold no loss", "Use more documents")
    wrong = losses_N[~((losses_N >= 0) & (losses_N <= 1))]  # NaN, too
    if wrong.size:
        raise TraceError("losses", f"{wrong[0]} is not in [0, 1]", "Clip or rescale the loss")


def least_units(delta: float, epsilon: float | None) -> int:
    """Units below which nothing can be certified, even if no loss is ever seen.

    With a loss that is 1 with chance delta and else 0, N units without one have chance (1 − δ)^N:
    no method that knows only [0, 1] gets below that. Conformal (epsilon None): 1/(N + 1) ≤ δ.

    >>> least_units(0.05, 0.05), least_units(0.05, None)
    (59, 19)
    """
    if epsilon is None:
        return math.ceil(1 / delta - 1 - 1e-9)
    return math.ceil(math.log(epsilon) / math.log1p(-delta) - 1e-9)
