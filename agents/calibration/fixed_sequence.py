"""Walk settings from the safest on, and stop at the first that cannot be certified.

Shape suffix: N independent units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from offramp.agents.calibration.pvalues import P_VALUES, Losses, require_losses
from offramp.controller.errors import ConfigError
from offramp.controller.release.certificate import Method, Walked

LossesOf = Callable[[float], Losses]
"""The losses [N] of a setting, each in [0, 1]; unit i is the same for every setting."""

OnStep = Callable[[Walked], None]
"""Told each setting as soon as it is judged."""


@dataclass(frozen=True, slots=True)
class WalkResult:
    """What a walk found.

    Attributes:
        walked: Every setting judged, safest first; at most the last failed.
        n: Units that each setting was judged on.
    """

    walked: tuple[Walked, ...]
    n: int

    @property
    def certified(self) -> Walked | None:
        """The last that *passed*; None: nothing is certified, and only full depth is safe."""
        passed = [step for step in self.walked if step.passed]
        return passed[-1] if passed else None


def learn_then_test(
    settings: Iterable[float],
    losses_of: LossesOf,
    *,
    delta: float,
    epsilon: float,
    method: Method = "hoeffding-bentkus",
    on_step: OnStep = lambda _: None,
) -> WalkResult:
    """Risk ≤ delta with probability ≥ 1 − epsilon (Angelopoulos et al. 2021, Learn then Test).

    Fixed-sequence testing (their §2.3.1): each setting is tested at the whole epsilon, in an order
    that was fixed before the losses were seen; the first failure ends it. A violation needs the
    *first* setting that is truly too risky to pass, so its chance is at most epsilon.

    Args:
        settings: λ, safest first. Neither they nor their order may rest on these losses.
        losses_of: Measures the losses of a setting.
        delta: Bound on the mean loss.
        epsilon: Probability that it may fail to hold.
        method: The p-value that decides.
        on_step: Told each setting as soon as it is judged.

    Raises:
        ConfigError: delta or epsilon outside (0, 1), no setting, a method that is not one, or
            settings measured on different numbers of units.
        TraceError: no loss, or a loss outside [0, 1].
    """
    require_share("delta", delta)
    require_share("epsilon", epsilon)
    if method not in P_VALUES:
        known = ", ".join(P_VALUES)
        raise ConfigError("method", f"{method!r} has no p-value", f"Use one of {known}")
    p_value = P_VALUES[method]

    def judge(setting: float, losses_N: Losses) -> Walked:
        p = p_value(losses_N, delta)
        risk = float(losses_N.mean())
        return Walked(setting=setting, risk=risk, p_value=p, passed=p <= epsilon)

    return _walk(settings, losses_of, judge, on_step)


def conformal_risk_control(
    settings: Iterable[float],
    losses_of: LossesOf,
    *,
    delta: float,
    on_step: OnStep = lambda _: None,
) -> WalkResult:
    """Expected loss of the next unit ≤ delta (Angelopoulos et al. 2024, theorem 1).

    Keeps λ while (N·R̂(λ) + B) / (N + 1) ≤ delta, B = 1 being the largest loss. The theorem wants
    losses that never fall along the walk; ours, measured with the cache that the exits leave
    behind, may. So a unit's loss counts as the worst it has had so far (their appendix A), which
    never falls, and never understates. Full depth has no loss, so there is always a fallback.

    Takes and raises what ``learn_then_test`` does; the risk of a step is that of the worst losses
    so far.
    """
    require_share("delta", delta)
    worst_N: Losses = np.zeros(1)

    def judge(setting: float, losses_N: Losses) -> Walked:
        nonlocal worst_N
        worst_N = np.maximum(worst_N, losses_N)
        risk = float(worst_N.mean())
        units = len(losses_N)
        passed = (units * risk + 1) / (units + 1) <= delta
        return Walked(setting=setting, risk=risk, p_value=None, passed=passed)

    return _walk(settings, losses_of, judge, on_step)


def _walk(
    settings: Iterable[float],
    losses_of: LossesOf,
    judge: Callable[[float, Losses], Walked],
    on_step: OnStep,
) -> WalkResult:
    walked: list[Walked] = []
    units = 0
    for setting in settings:
        losses_N = np.asarray(losses_of(setting), np.float64)
        require_losses(losses_N)
        if walked and len(losses_N) != units:
            problem = f"has {len(losses_N)} losses, those before it {units}"
            raise ConfigError(f"setting {setting:g}", problem, "Measure the same units")
        units = len(losses_N)
        walked.append(judge(setting, losses_N))
        on_step(walked[-1])
        if not walked[-1].passed:
            break
    if not walked:
        raise ConfigError("settings", "name nothing to test")
    return WalkResult(tuple(walked), units)


def require_share(field: str, value: float) -> None:
    """Refuse what is not in (0, 1).

    Raises:
        ConfigError: it is not.
    """
    if not 0 < value < 1:
        raise ConfigError(field, f"{value} is not in (0, 1)", "Write it like 0.05")
