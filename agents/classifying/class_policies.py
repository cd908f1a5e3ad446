"""Families of policies on classified texts: each at its cheapest setting that keeps accuracy.

Chosen on the label, never on agreement with full depth: an exit may be more right than full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from offramp.agents.learning.halting import HaltingConfig, outputs, train_halting
from offramp.agents.learning.phat import PhatConfig, logit, train_phat
from offramp.agents.learning.ppo import PPOConfig, train_ppo
from offramp.agents.placing.contenders import GRID
from offramp.agents.placing.replay import mean_cost, walk
from offramp.controller.costs.table import CostTable
from offramp.controller.features import SOFTMAX_V2, BoolArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.envs.traces.tokens import TokenTraces

LOSS = 0.005
"""Accuracy that a setting may lose unless told otherwise, one standard error included."""

LOGITS = np.linspace(-3.0, 6.0, GRID)
PREFERENCES = np.geomspace(0.02, 2.0, GRID)
SHARES = np.linspace(0.0, 1.0, GRID)
"""Quantiles, over all exits, of the column that a rule compares: as dense where texts lie close."""

FURTHEST = 16.0
"""Logits beyond which a chance counts as this near 0 or 1."""

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
        right_N: Whether it finds the label, of each text.
    """

    family: str
    setting: float | None
    policy: Policy
    accuracy: float
    mean_layers: float
    cost: float
    right_N: BoolArray = field(repr=False, compare=False)

    def lost_below(self, other: ClassPolicy) -> float:
        """Accuracy lost against another on the same texts, and one standard error on top.

        Of many settings some seem to lose less than they do, and the cheapest that is allowed is
        one of them; so a setting has to be better than the bound by what chance alone moves it
        (the rule of one standard error: Breiman et al. 1984, section 3.4.3).
        """
        lost_N = other.right_N.astype(np.float64) - self.right_N
        return float(lost_N.mean() + lost_N.std() / np.sqrt(len(lost_N)))


def replayed(
    family: str, setting: float | None, policy: Policy, traces: TokenTraces, costs: CostTable
) -> ClassPolicy:
    """Send recorded texts through a policy.

    Raises:
        ConfigError: it asks where nothing was recorded.
    """
    walked = walk(policy, traces)
    right_N = walked.quality_N(traces, "label") > 0
    depth_E1 = np.array([*traces.header.exits, traces.header.layers])
    return ClassPolicy(
        family=family,
        setting=setting,
        policy=policy,
        accuracy=float(right_N.mean()),
        mean_layers=float(depth_E1[walked.taken_N].mean()),
        cost=mean_cost(policy, walked, traces, costs),
        right_N=right_N,
    )


def cheapest(
    tried: Iterable[ClassPolicy], better: ClassPolicy, loss: float = LOSS
) -> ClassPolicy | None:
    """The cheapest setting that loses at most so much (``lost_below``); None if none does."""
    meeting = [each for each in tried if each.lost_below(better) <= loss]
    return min(meeting, key=lambda each: each.cost, default=None)


def better_of(full: ClassPolicy, fixed: ClassPolicy) -> ClassPolicy:
    """Full depth or the best fixed exit, which is cheaper: whichever finds more labels."""
    return full if full.accuracy > fixed.accuracy else fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFamily:
    """A rule or agent along its one setting.

    Attributes:
        name: What it is called.
        build: Makes the policy of a setting.
        settings: What is tried.
        symbol: What evaluations write before the setting.
    """

    name: str
    build: Callable[[float], Policy]
    settings: Sequence[float]
    symbol: str = "τ="


def learn_families(
    fit: TokenTraces, costs: CostTable, *, seed: int = 0, agent: PPOConfig | None = AGENT
) -> list[ClassFamily]:
    """The rules, and what is learned beside them: Q-exit, p̂ of the label, PPO rewarded by it.

    Args:
        fit: Texts that these learn from, as heads see them that were not fitted to them.
        costs: Measured prices of layers, heads and probes.
        seed: Seeds what is learned.
        agent: How PPO is trained; None leaves it out.
    """
    exits = fit.header.exits

    def entropy(setting: float) -> Policy:
        return EntropyExit(exits=exits, threshold=setting)

    def margin(setting: float) -> Policy:
        return ThresholdPolicy(exits, SOFTMAX_V2, "margin", setting)

    def patience(setting: float) -> Policy:
        return PatienceExit(exits=exits, patience=int(setting))

    softmax_MS = fit.softmax_NES.reshape(-1, fit.softmax_NES.shape[2])
    margins, entropies = (np.unique(np.quantile(softmax_MS[:, each], SHARES)) for each in (1, 2))
    families = [
        ClassFamily(name="fixed exit", build=lambda s: FixedExit(int(s)), settings=exits),
        ClassFamily(name="entropy", build=entropy, settings=entropies.tolist()),
        ClassFamily(name="margin", build=margin, settings=margins.tolist()),
        ClassFamily(name="patience", build=patience, settings=range(1, len(exits)), symbol="t="),
    ]
    families.append(q_exit(fit, seed))
    weights = train_phat(fit, replace(CLASSIFIER, seed=seed), quality="label")
    families.append(
        ClassFamily(
            name="p̂",
            build=lambda s: MlpPolicy(exits, SOFTMAX_V2, weights, s),
            settings=LOGITS.tolist(),
        )
    )
    if agent is not None:
        trained = train_ppo(fit, costs, replace(agent, seed=seed))
        families.append(
            ClassFamily(
                name="PPO",
                build=lambda s: MlpPolicy(exits, SOFTMAX_V2, trained.weights(s)),
                settings=PREFERENCES.tolist(),
                symbol="λ=",
            )
        )
    return families


def q_exit(fit: TokenTraces, seed: int) -> ClassFamily:
    """Make PALBERT's Q-exit, along q: quantiles of the learned chance of having halted by now."""
    exits = fit.header.exits
    weights = train_halting(fit, HaltingConfig(seed=seed))
    logits_NE = outputs(MlpPolicy(exits, SOFTMAX_V2, weights), fit.features_NEF)
    chances_NE = 1 / (1 + np.exp(-logits_NE.clip(-FURTHEST, FURTHEST)))
    return ClassFamily(
        name="Q-exit",
        build=lambda s: MlpPolicy(exits, SOFTMAX_V2, weights, logit(s)),
        settings=np.unique(np.quantile(chances_NE, SHARES)).tolist(),
        symbol="q=",
    )


def place_families(
    families: Sequence[ClassFamily], choose: TokenTraces, costs: CostTable, loss: float = LOSS
) -> list[ClassPolicy]:
    """Full depth, the best fixed exit, and each family at its cheapest setting within a loss.

    A family whose every setting loses more is left out.

    Args:
        families: What ``learn_families`` gave, the fixed exit first.
        choose: Texts that settings are chosen on.
        costs: Measured prices of layers, heads and probes.
        loss: Accuracy that a setting may lose on those, one standard error included, below the
            better of full depth and the best fixed exit.
    """
    tried = {
        each.name: [
            replayed(each.name, setting, each.build(setting), choose, costs)
            for setting in map(float, each.settings)
        ]
        for each in families
    }
    full = replayed("full depth", None, NeverExit(), choose, costs)
    best = max(tried["fixed exit"], key=lambda each: (each.accuracy, -each.cost))
    better = better_of(full, best)
    found = {name: cheapest(each, better, loss) for name, each in tried.items()}
    found["fixed exit"] = found["fixed exit"] or best
    return [full, *(each for each in found.values() if each is not None)]
