"""Families of policies on classified texts: each at its cheapest setting that keeps accuracy.

Chosen on the label, never on agreement with full depth: an exit may be more right than full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from offramp.agents.learning.phat import PhatConfig, train_phat
from offramp.agents.learning.ppo import PPOConfig, train_ppo
from offramp.agents.placing.contenders import GRID
from offramp.agents.placing.replay import mean_cost, walk
from offramp.controller.costs.table import CostTable
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.envs.traces.tokens import TokenTraces

LOSS = 0.005
"""Accuracy that a setting may lose unless told otherwise."""

LOGITS = np.linspace(-3.0, 6.0, GRID)
PREFERENCES = np.geomspace(0.02, 2.0, GRID)
ENTROPIES = np.geomspace(1e-3, 1.0, GRID)
MARGINS = 1 - np.geomspace(1e-3, 1.0, GRID)

CLASSIFIER = PhatConfig(epochs=40, batch=256)
"""How p̂ is fitted here: more passes over fewer rows."""

AGENT = PPOConfig(steps=400_000, envs=512, quality="label")
"""How PPO is trained here: there are a few thousand texts, not a million tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPolicy:
    """A policy at one setting, as replay finds it.

    Attributes:
        family: Name of the rule or agent.
        setting: Its threshold, patience, layer or preference; None for full depth.
        policy: The policy, ready to run.
        accuracy: Share of the texts whose label it finds.
        mean_layers: Mean layers executed.
        cost: Mean time, in units of a text at full depth, probes included.
    """

    family: str
    setting: float | None
    policy: Policy
    accuracy: float
    mean_layers: float
    cost: float


def replayed(
    family: str, setting: float | None, policy: Policy, traces: TokenTraces, costs: CostTable
) -> ClassPolicy:
    """Send recorded texts through a policy.

    Raises:
        ConfigError: it asks where nothing was recorded.
    """
    walked = walk(policy, traces)
    depth_E1 = np.array([*traces.header.exits, traces.header.layers])
    return ClassPolicy(
        family=family,
        setting=setting,
        policy=policy,
        accuracy=float(walked.quality_N(traces, "label").mean()),
        mean_layers=float(depth_E1[walked.taken_N].mean()),
        cost=mean_cost(policy, walked, traces, costs),
    )


def cheapest(tried: Iterable[ClassPolicy], least: float) -> ClassPolicy | None:
    """The cheapest setting that is at least so accurate; None if none is."""
    meeting = [each for each in tried if each.accuracy >= least]
    return min(meeting, key=lambda each: each.cost, default=None)


def place_families(
    fit: TokenTraces,
    choose: TokenTraces,
    costs: CostTable,
    *,
    loss: float = LOSS,
    seed: int = 0,
    agent: PPOConfig | None = AGENT,
) -> list[ClassPolicy]:
    """Full depth, the best fixed exit, and each family at its cheapest setting within a loss.

    A family whose every setting loses more is left out.

    Args:
        fit: Texts that p̂ and PPO learn from, none of which a head was fitted to.
        choose: Texts that settings are chosen on.
        costs: Measured prices of layers, heads and probes.
        loss: Accuracy that a setting may lose on those, below the better of full depth and the
            best fixed exit.
        seed: Seeds what is learned.
        agent: How PPO is trained; None leaves it out.
    """
    exits = choose.header.exits
    full = replayed("full depth", None, NeverExit(), choose, costs)
    fixed = [replayed("fixed exit", each, FixedExit(each), choose, costs) for each in exits]
    best = max(fixed, key=lambda each: (each.accuracy, -each.cost))
    least = max(full.accuracy, best.accuracy) - loss

    def place(family: str, build: Callable[[float], Policy], settings: Iterable[float]) -> None:
        tried = (replayed(family, s, build(s), choose, costs) for s in map(float, settings))
        if (found := cheapest(tried, least)) is not None:
            placed.append(found)

    placed = [full, cheapest(fixed, least) or best]
    place("entropy", lambda s: EntropyExit(exits=exits, threshold=s), ENTROPIES)
    place("margin", lambda s: ThresholdPolicy(exits, SOFTMAX_V2, "margin", s), MARGINS)
    place("patience", lambda s: PatienceExit(exits=exits, patience=int(s)), range(1, len(exits)))
    weights = train_phat(fit, replace(CLASSIFIER, seed=seed), quality="label")
    place("p̂", lambda s: MlpPolicy(exits, SOFTMAX_V2, weights, s), LOGITS)
    if agent is not None:
        trained = train_ppo(fit, costs, replace(agent, seed=seed))
        place("PPO", lambda s: MlpPolicy(exits, SOFTMAX_V2, trained.weights(s)), PREFERENCES)
    return placed
