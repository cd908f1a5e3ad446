"""The points that a request may pick between: what a certificate covers, and full depth, priced.

A walk that ends at some setting has bounded the loss of every setting before it, too, for all of
them at once. Where λ is the policy's threshold, the policy of each can be made from the one that
was released, and, from which share of the tokens left where, priced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from offramp.controller.costs.prices import Prices
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import NeverExit, Policy, ThresholdPolicy
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.manifest import Manifest

BUDGET, WEIGHT = "offramp.latency_budget_ms", "offramp.energy_weight"
"""What requests call the two, over HTTP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a request asks of its point.

    Attributes:
        latency_budget_ms: Most milliseconds per token that may be predicted; None: any.
        energy_weight: What full depth's energy for a token is worth, in units of loss, from 0 on.
        quality: 1 minus the loss that has to be bounded, in [0, 1]; None: any.
    """

    latency_budget_ms: float | None = None
    energy_weight: float = 0.0
    quality: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedPoint:
    """One policy, and what is known of it.

    Attributes:
        policy: Full depth, or the released policy at one of the settings that passed.
        risk: Mean loss on the calibration data; 0 at full depth.
        token_ms: Predicted milliseconds per token of a row that is alone.
        energy: Its predicted energy per token over full depth's; None if the table has none.
        setting: The setting that passed; None at full depth.
    """

    policy: Policy
    risk: float
    token_ms: float
    energy: float | None
    setting: float | None = None


def full_depth(costs: CostTable) -> PricedPoint:
    """The point that loses nothing and that there always is."""
    prices = costs.at(1)
    energy = None if prices.full_j is None else 1.0
    return PricedPoint(policy=NeverExit(), risk=0.0, token_ms=1e3 * prices.full_s, energy=energy)


def certified_policies(policy: Policy, certificate: Certificate | None) -> dict[float, Policy]:
    """The policy of every setting that passed, by setting, safest first.

    Args:
        policy: The released policy, or that of another such setting.
        certificate: The release's.

    Returns:
        {} if λ is not the policy's threshold.
    """
    if certificate is None or not isinstance(policy, ThresholdPolicy | MlpPolicy):
        return {}
    passed = [step.setting for step in certificate.walked if step.passed]
    if policy.threshold not in passed or not certificate.parameter.startswith("threshold"):
        return {}
    return {each: policy if each == policy.threshold else _at(policy, each) for each in passed}


def certified_range(policy: Policy, certificate: Certificate | None) -> dict[float, Policy]:
    """The same for a released policy, whose setting is the last, the fastest; {} if it is not."""
    policies = certified_policies(policy, certificate)
    return policies if policies and [*policies.values()][-1] is policy else {}


def require_range(manifest: Manifest, policy: Policy) -> None:
    """Refuse to release a policy whose workers may move and have nowhere to go.

    Raises:
        ConfigError: the certificate bounds fewer than two settings, or workers would trip first.
    """
    above = manifest.guardrails.get("adapt_above")
    if above is None:
        return
    most = manifest.bounds.max_disagreement
    if len(certified_range(policy, manifest.certificate)) < 2:
        problem = "the policy has no two certified settings to move between"
        raise ConfigError("adapt_above", problem, "Calibrate its threshold, or leave it out")
    if above >= most:
        problem = f"{above:g} is not below max_disagreement, {most:g}, at which workers trip"
        raise ConfigError("adapt_above", problem, "Correct one of the guardrails")


def certified_points(
    policy: Policy, certificate: Certificate, costs: CostTable
) -> tuple[PricedPoint, ...]:
    """The points of the settings that passed.

    There are none if λ is not the policy's threshold, if calibration did not record where tokens
    left, or if the table does not price the policy's probe or skipped layers are not projected.
    """
    policies = certified_policies(policy, certificate)
    if not policies or policy.schema is None or certificate.decode_mode != "project":
        return ()
    if policy.schema.name in costs.probes:
        costs = costs.with_probe(policy.schema.name)
    elif costs.schema not in ("", policy.schema.name):
        return ()
    prices = costs.at(1)
    points = []
    for step in certificate.walked:
        if step.passed and len(step.leaves) == len(policy.exits):
            seconds = _spent(prices, policy.exits, step.leaves, "s")
            assert seconds is not None  # a table has every part's seconds
            joules = _spent(prices, policy.exits, step.leaves, "j")
            points.append(
                PricedPoint(
                    policy=policies[step.setting],
                    risk=step.risk,
                    token_ms=1e3 * seconds,
                    energy=joules and prices.full_j and joules / prices.full_j,
                    setting=step.setting,
                )
            )
    return tuple(points)


def pick(points: Sequence[PricedPoint], target: Target) -> PricedPoint:
    """The point of the least risk, plus the weight of its energy, within the latency budget.

    Raises:
        RequestError: none is predicted to be so fast, or energy counts and is not known.
    """
    budget, weight = target.latency_budget_ms, target.energy_weight
    within = [each for each in points if budget is None or each.token_ms <= budget]
    if not within:
        least = min(each.token_ms for each in points)
        full = max(each.token_ms for each in points if isinstance(each.policy, NeverExit))
        problem = (
            f"no point of this pool takes {budget:g} ms a token: the fastest that promises the "
            f"quality asked for is predicted at {least:.4g} ms, full depth at {full:.4g} ms"
        )
        raise RequestError(BUDGET, problem, "Ask for at least so much, or leave it out")
    if weight and any(each.energy is None for each in within):
        raise RequestError(
            WEIGHT, "the pool's cost table holds no energy", "Leave it out, or name a latency"
        )
    return min(
        within,
        key=lambda each: (each.risk + weight * (each.energy or 0.0), each.risk, each.token_ms),
    )


def _at(policy: ThresholdPolicy | MlpPolicy, threshold: float) -> Policy:
    if isinstance(policy, MlpPolicy):
        return policy.at(threshold)
    return replace(policy, threshold=threshold)


def _spent(
    prices: Prices, exits: Sequence[int], leaves: Sequence[float], unit: Literal["s", "j"]
) -> float | None:
    """Seconds or joules per token; None where a part's are unknown."""
    parts = {
        part: getattr(prices, f"{part}_{unit}")
        for part in ("layer", "head", "probe", "policy", "fill", "step", "build")
    }
    if None in parts.values():
        return None
    ask = parts["probe"] + parts["policy"]
    always = parts["step"] + parts["build"] + parts["head"]
    depths = [*exits, prices.layers]
    asked = [*range(1, len(exits) + 1), len(exits)]
    shares = [*leaves, 1.0 - sum(leaves)]
    layers = sum(
        share * (depth * parts["layer"] + (prices.layers - depth) * parts["fill"] + times * ask)
        for share, depth, times in zip(shares, depths, asked, strict=True)
    )
    return float(always + layers)
