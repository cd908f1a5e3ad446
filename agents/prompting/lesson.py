"""One lesson on prompts, as far as it has come: what is read, where tokens may leave, who learns.

Shape suffixes: P policies, N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from offramp.agents.learning.prompt_ppo import train_prompt_policy
from offramp.agents.placing.contenders import Contender, full_depth
from offramp.agents.prompting.first_rules import far_rule
from offramp.agents.prompting.prompt_checkpoint import PromptCheckpoint
from offramp.agents.prompting.prompt_config import PromptLessonConfig
from offramp.agents.prompting.prompt_meter import PromptMeter, Readings
from offramp.agents.prompting.prompt_report import Worth
from offramp.agents.prompting.prompt_session import PromptReadingSession
from offramp.agents.prompting.read_tasks import LONGEST, LessonPrompts, Stretch
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import PROMPT_V1
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, Policy
from offramp.worker.engine.engine import AdaptiveEngine

FIXED, FAR, LEARNED = "fixed exit", "far ahead first", "PPO for prompts"
"""Families of policies, as tables and manifests name them."""

LOOKED = 32
"""Training prompts on which exits and the first rule are chosen."""

MOST_FIXED = 12
"""Fixed exits that are measured at most, evenly spread over the depth."""

FAR_PARTS = (0.25, 0.5, 0.75)
"""Shares of a prompt that may have to follow a token for it to leave at the first exit."""

PAIR = 2
"""Neighbouring exits that the first rule chooses between."""

LEAST_LAYERS = 2
"""Layers below which there is no exit before the last."""

Progress = Callable[[str, int, int], None]
"""Told (stage, done so far, in all)."""


class PromptLesson:
    """Reads prompts and trains, remembering what was done.

    Args:
        config: Settings of the lesson.
        engine: The model, idle.
        prompts: What is learned from, what chooses, and what is reported on.
        checkpoint: What an earlier run has done.
        out: Where the checkpoint is kept.
        on_progress: Told as it advances.

    Raises:
        ConfigError: exits that are no layers of the model, or prompts beyond its context.
    """

    def __init__(
        self,
        config: PromptLessonConfig,
        engine: AdaptiveEngine,
        prompts: LessonPrompts,
        checkpoint: PromptCheckpoint,
        out: Path,
        on_progress: Progress,
    ) -> None:
        require_fitting(config, engine)
        self.config, self.engine, self.prompts = config, engine, prompts
        self.layers = engine.stack.layers
        self.meter = PromptMeter(engine, config)
        self.on_progress = on_progress
        self._done, self._out = checkpoint, out
        self._costs: CostTable | None = None

    @property
    def costs(self) -> CostTable:
        """What a layer and a fill cost here, measured at the first call."""
        if self._costs is None:
            prices = self._done.prices
            if not prices:
                measured = self.meter.prices(self._stretches("looked"))
                prices["layer_s"], prices["fill_s"] = measured
                self._done.save(self._out)
            self._costs = CostTable(
                layer_s=prices["layer_s"],
                head_s=prices["layer_s"],
                probe_s=0.0,
                policy_s=0.0,
                fill_s=prices["fill_s"],
                step_s=0.0,
                layers=self.layers,
                machine="prompts read in full and at half the depth, in turn",
            )
        return self._costs

    def fixed(self) -> list[Contender]:
        """A fixed exit after every layer, or after some of many."""
        last = self.layers - 1
        count = min(MOST_FIXED, last)
        layers = sorted({max(1, round(last * part / count)) for part in range(1, count + 1)})
        return [_contender(FIXED, layer, FixedExit(layer), "") for layer in layers]

    def read(self, split: str, contenders: Sequence[Contender], stage: str) -> list[Readings]:
        """Read a split's prompts with each policy; P readings of N prompts.

        Args:
            split: "looked" (the first training prompts), "validation" or "test".
            contenders: Policies; their names tell them apart in the checkpoint.
            stage: Names the progress that is told.
        """
        found = []
        for done, each in enumerate(contenders, 1):
            name = f"{split}/{each.name}"
            known = self._done.readings_of(name)
            if known is None:
                known = self.meter.read(self._stretches(split), as_exits(each))
                self._done.keep_readings(name, known)
                self._done.save(self._out)
            found.append(known)
            self.on_progress(stage, done, len(contenders))
        return found

    def worth(self, full: Readings) -> Worth:
        """How readings of the same prompts as ``full`` are judged."""
        return Worth(full, self.config.weight, self.costs.fill_s / self.costs.layer_s)

    def first_rule(self, fixed: Sequence[Contender]) -> Contender:
        """The rule by distance that is worth most on some training prompts.

        Tokens leave at the exits that were asked for; else at the best fixed exit and the one
        before it, or the one behind it.
        """
        tried = [
            Contender(
                family=FAR,
                setting=far,
                offline_agreement=None,
                policy=far_rule(exits, self.layers, far),
                symbol="beyond ",
                note=f" at {', '.join(map(str, exits))}",
            )
            for exits in self._exits(fixed)
            for far in (part * self.config.prompt_tokens for part in FAR_PARTS)
        ]
        return tried[self._best("looked", tried, "first rule")]

    def _exits(self, fixed: Sequence[Contender]) -> list[tuple[int, ...]]:
        """The layers that were asked for, or pairs with the best fixed exit in them."""
        if self.config.exits:
            return [self.config.exits]
        best = self._best("looked", fixed, "fixed exits")
        layers = [int(each.setting or 0) for each in fixed]
        pairs = [tuple(layers[max(0, first) : first + PAIR]) for first in (best - 1, best)]
        return [pair for pair in pairs if len(pair) == PAIR] or [(layers[best],)]

    def learned(self, start: Contender) -> list[Contender]:
        """A policy by PPO for each seed, from the first rule."""
        rule = as_exits(start)
        found = []
        for seed in self.config.seeds:
            weights = self._done.agent_of(seed)
            if weights is None:
                agent = train_prompt_policy(
                    lambda: self._session(rule.exits),
                    self.costs,
                    rule,
                    self.config.ppo(seed),
                    lambda done, steps, seed=seed: self.on_progress(  # type: ignore[misc]  # a default
                        f"PPO seed {seed}", done, steps
                    ),
                )
                weights = agent.weights(self.config.weight)
                self._done.keep_agent(seed, weights)
                self._done.save(self._out)
            policy = MlpPolicy(rule.exits, PROMPT_V1, weights)
            found.append(_contender(LEARNED, seed, policy, "seed "))
        return found

    def _best(self, split: str, contenders: Sequence[Contender], stage: str) -> int:
        full, *found = self.read(split, [full_depth(), *contenders], stage)
        worth = self.worth(full)
        rewards = [float(worth.rewards_N(each).mean()) for each in found]
        return max(range(len(rewards)), key=rewards.__getitem__)

    def _session(self, exits: tuple[int, ...]) -> PromptReadingSession:
        return PromptReadingSession(
            self.engine.model,
            [(*each.prompt, *each.following) for each in self.prompts.train],
            prompt_tokens=self.config.prompt_tokens,
            following=self.config.following,
            exits=exits,
            config=self.engine.config,
            **self.config.kept,
        )

    def _stretches(self, split: str) -> list[Stretch]:
        if split == "test":
            return [task.stretch for task in self.prompts.test]
        return self.prompts.validation if split == "validation" else self.prompts.train[:LOOKED]


def as_exits(contender: Contender) -> ExitPolicy:
    """A contender's policy, which can be asked about prompts."""
    policy = contender.policy
    assert isinstance(policy, ExitPolicy)
    return policy


def require_fitting(config: PromptLessonConfig, engine: AdaptiveEngine) -> None:
    """Refuse settings that do not fit the model.

    Raises:
        ConfigError: exits that are no layers of the model, or prompts beyond its context.
    """
    layers, exits = engine.stack.layers, list(config.exits)
    if exits != sorted(set(exits)) or not all(0 < each < layers for each in exits):
        problem = f"{config.exits} do not ascend within [1, {layers - 1}]"
        raise ConfigError("exits", problem, "Use layers of the model")
    if layers < LEAST_LAYERS:
        raise ConfigError("model", f"has {layers} layers", "Exits need a model of two or more")
    length = config.prompt_tokens + max(config.following, LONGEST)
    if length >= engine.stack.context:
        problem = f"{config.prompt_tokens}, and what follows, exceed the model's context of "
        raise ConfigError(
            "prompt_tokens", f"{problem}{engine.stack.context}", "Ask for shorter prompts"
        )


def _contender(family: str, setting: float, policy: Policy, symbol: str) -> Contender:
    return Contender(
        family=family, setting=setting, offline_agreement=None, policy=policy, symbol=symbol
    )
