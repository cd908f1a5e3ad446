"""Contenders, and the settings at which a family meets some offline agreements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from offramp.agents.placing.replay import replay
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.policies.protocols import Policy

GRID = 41
"""Settings tried per family when operating points are placed."""

NEAR = 0.01
"""Agreements this far from a target still count as meeting it, when variants are compared."""

SUBSET = "p̂ on best exits"
"""A family whose members differ in their exits, too."""

SYMBOLS = {
    "fixed exit": "layer ",
    "SkipDecode": "to layer ",
    "PABEE patience": "t=",
    "PPO": "λ=",
    "backward induction": "λ=",
    "UCB bandit": "λ=",
    "EERO budget": "B=",
    "FREE": "ζ=",
    "GREEN-CODE": "logit T=",
    SUBSET: "logit τ=",
}
"""What the setting of a family is called; τ elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One policy at one operating point.

    Attributes:
        family: What kind of rule or agent.
        setting: Its threshold, preference or layer; None for full depth.
        offline_agreement: On validation traces; None for full depth.
        policy: Ready to run.
        offline_cost: On validation traces, in units of a full-depth token's time; None for full
            depth.
    """

    family: str
    setting: float | None
    offline_agreement: float | None
    policy: Policy
    offline_cost: float | None = None

    @property
    def name(self) -> str:
        """Family and setting, such as ``p̂ τ=0.92``."""
        if self.setting is None:
            return self.family
        # Thresholds crowd below 1, where three digits would not tell them apart.
        digits = 6 if 0.99 < self.setting < 1 else 3
        name = f"{self.family} {SYMBOLS.get(self.family, 'τ=')}{self.setting:.{digits}g}"
        if self.family == SUBSET:
            return f"{name} at {','.join(map(str, self.policy.exits))}"
        return name


def measured(family: str, setting: float, policy: Policy, data: TrainingData) -> Contender:
    """A contender with its agreement on the validation traces.

    Raises:
        ConfigError: the policy asks at a layer, or reads a schema, that was not recorded.
    """
    found = replay(policy, data.validation, data.costs)
    return Contender(
        family=family,
        setting=setting,
        offline_agreement=found.agreement,
        policy=policy,
        offline_cost=found.cost,
    )


def placed(
    family: str,
    build: Callable[[float], Policy],
    settings: Iterable[float],
    targets: Sequence[float],
    data: TrainingData,
) -> list[Contender]:
    """For each target the setting whose offline agreement is nearest; each setting once."""
    tried = [measured(family, float(s), build(float(s)), data) for s in settings]
    return nearest(tried, targets)


def nearest(tried: Sequence[Contender], targets: Sequence[float]) -> list[Contender]:
    """For each target the contender whose offline agreement is nearest; each once."""
    chosen: dict[int, Contender] = {}
    for target in targets:
        best = min(tried, key=lambda c: abs((c.offline_agreement or 0.0) - target))
        chosen[id(best)] = best
    return list(chosen.values())


def cheapest_variant(variants: Sequence[Sequence[Contender]], target: float) -> Contender:
    """Of each variant's setting nearest the target, the cheapest that is near; else the nearest."""
    candidates = [nearest(each, [target])[0] for each in variants]
    near = [each for each in candidates if abs((each.offline_agreement or 0) - target) <= NEAR]
    if not near:
        return nearest(candidates, [target])[0]
    return min(near, key=lambda each: each.offline_cost or 0.0)
