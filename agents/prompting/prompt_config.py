"""Settings of ``offramp train --for prompts``; every option is described here and in the docs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from offramp.agents.learning.prompt_ppo import PromptPPOConfig
from offramp.controller.errors import ConfigError

PLACES = ("model", "corpus", "translators", "threads")
"""Settings that say where things lie, or how many threads are used, and not what is learned."""

LEAST_DOCUMENTS = 2
"""Documents of each split below which no interval can be told."""

COUNTS = ("prompt_tokens", "following", "keep_last", "steps", "shown", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLessonConfig:
    """How policies for prompts are taught.

    Attributes:
        model: Folder of the model.
        corpus: Folder of documents that prompts are cut from; "" takes Python's standard library.
        train_documents: Training documents at most, a prompt of each.
        validation_documents: Validation documents at most, which choose.
        test_documents: Test documents at most, which the result is reported on.
        exits: Layers after which tokens may leave; () takes the best fixed exit and a neighbour.
        dtype: Weights' dtype, "float32" or "bfloat16".
        translators: Folder that ``offramp tune`` wrote for the model, with a map for the fill; ""
            projects exits' states as they are.
        prompt_tokens: Tokens of a prompt.
        following: Tokens behind a prompt whose loss is measured.
        keep_first: First tokens of a prompt that run every layer.
        keep_last: Last tokens that do, at least 1.
        weight: λ, what all of the prompt's time is worth, in nats per token of what follows.
        steps: Decisions that PPO learns from.
        learning_rate: At PPO's start; it falls linearly to 2 % of this.
        shown: Decisions of the first rule that the actor learns to repeat before PPO.
        seeds: Seeds of everything random; a policy is trained with each.
        threads: Torch threads.

    Raises:
        ConfigError: a value outside its range, or a prompt of which every token is kept.
    """

    model: str
    corpus: str = ""
    train_documents: int = 32
    validation_documents: int = 24
    test_documents: int = 40
    exits: tuple[int, ...] = ()
    dtype: str = "float32"
    translators: str = ""
    prompt_tokens: int = 512
    following: int = 24
    keep_first: int = 4
    keep_last: int = 32
    weight: float = 0.5
    steps: int = 49_152
    learning_rate: float = 3e-4
    shown: int = 8192
    seeds: tuple[int, ...] = (0,)
    threads: int = 1

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1", "Use 1 or more")
        for name in ("train_documents", "validation_documents", "test_documents"):
            if getattr(self, name) < LEAST_DOCUMENTS:
                problem = f"{getattr(self, name)} is below {LEAST_DOCUMENTS}"
                raise ConfigError(name, problem, "Intervals are over documents: use more")
        if self.keep_first < 0:
            raise ConfigError("keep_first", f"{self.keep_first} is below 0", "Use 0 or more")
        kept = self.keep_first + self.keep_last
        if self.prompt_tokens <= kept:
            problem = f"{self.prompt_tokens} are no more than the {kept} that are kept"
            remedy = f"Use {kept + 1} or more, or lower keep_first or keep_last"
            raise ConfigError("prompt_tokens", problem, remedy)
        if not 0 < self.weight < math.inf:
            raise ConfigError("weight", f"{self.weight} is no weight", "Use one above 0, like 0.5")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError("learning_rate", f"{self.learning_rate} is not above 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            problem = f"{self.seeds} are not one or more numbers from 0 on, each once"
            raise ConfigError("seeds", problem, "Write it like 0,1,2")

    @property
    def kept(self) -> dict[str, int]:
        """How many tokens nobody is asked about, as ``PromptExits`` takes them."""
        return {"keep_first": self.keep_first, "keep_last": self.keep_last}

    def ppo(self, seed: int) -> PromptPPOConfig:
        """Hyper-parameters of the run with a seed; a short run updates at least twice."""
        usual = PromptPPOConfig().ppo
        rollout = max(1, min(usual.rollout, self.steps // (2 * usual.envs)))
        ppo = replace(
            usual,
            steps=self.steps,
            rollout=rollout,
            batch=min(usual.batch, rollout * usual.envs),
            learning_rate=self.learning_rate,
            lambda_range=(self.weight, self.weight),
            seed=seed,
        )
        return PromptPPOConfig(ppo=ppo, shown=self.shown)

    def settings(self) -> dict[str, Any]:
        """Whatever changes the result, for checkpoints and manifests."""
        return {name: value for name, value in asdict(self).items() if name not in PLACES}
