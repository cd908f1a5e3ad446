"""Trains a policy for prompts on training documents and measures it on held-out ones.

Compared is the reward of ``offramp/PrefillExit-v0``, prompt by prompt: the learned policy against
the rule that it began with, fixed exits, and as many tokens at the same exits, but at random.
Layer calls are counted, and losses measured, by the engine.

    python benchmarks/learning/prompt_lesson.py --out runs/prompts     # --quick: a few minutes
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from offramp.agents.learning.prompt_ppo import PromptPPOConfig, train_prompt_policy
from offramp.agents.recording.corpus import load_corpus, long_documents
from offramp.controller.costs.table import CostTable
from offramp.controller.features import PROMPT_V1, BoolArray, FloatArray
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, FixedExit
from offramp.controller.policies.rules.prompt_rules import RandomShare
from offramp.controller.release.bundle import PolicyBundle
from offramp.research.prompt_session import PromptReadingSession
from offramp.worker import AdaptiveEngine, EngineConfig, PromptExits
from offramp.worker.engine.follow import nats_per_token, submit_scored
from offramp.worker.model.loading import (
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from offramp.worker.profiling.profile import describe_machine

PROMPT, FOLLOWING, RESAMPLES = 512, 24, 2000
"""Tokens of a prompt, tokens behind it that are scored, samples of the bootstrap."""

AHEAD, DEPTH = PROMPT_V1.index("ahead"), PROMPT_V1.index("depth")
SCALE = 256
"""Tokens ahead that PROMPT_V1 counts as 1."""

MUCH = 1000.0
"""A depth's weight in logits, beside which no place counts."""

FILL = 0.03
"""Price of a skipped layer's keys and values, in layers: about what one product of this width takes
of a layer's work."""


@dataclass(frozen=True, slots=True)
class Readings:
    """What came of the held-out prompts under one policy; an entry per prompt."""

    losses_N: NDArray[np.float64]
    saved_N: NDArray[np.float64]

    def rewards_N(self, full: Readings, weight: float) -> NDArray[np.float64]:
        """Of ``offramp/PrefillExit-v0`` at λ = ``weight``."""
        gained_N = full.losses_N - self.losses_N
        return np.asarray((gained_N + weight * self.saved_N) / (1 + weight))


class SomeThenAll:
    """A random share leaves at the first exit, all others at the last: the control."""

    schema, candidates_VK = PROMPT_V1, None

    def __init__(self, exits: tuple[int, ...], share: float, layers: int) -> None:
        self.exits = exits
        self._some = RandomShare(exits=exits[:1], share=share)
        self._last = (exits[-1] - 0.5) / layers

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Tokens that leave, [N]."""
        if features_NF[0, DEPTH] > self._last:
            return np.ones(len(features_NF), np.bool_)
        return self._some.leave(features_NF)


def stretches(model: str, split: str, documents: int) -> list[list[int]]:
    """From somewhere in each document, as many tokens as a prompt and what follows it have."""
    texts = [each for each in load_corpus(None) if each.split == split]
    rng, length = np.random.default_rng(0), PROMPT + FOLLOWING
    found = []
    for _, tokens in long_documents(model, texts, 2 * PROMPT, documents):
        start = int(rng.integers(len(tokens) - length))
        found.append(list(tokens[start : start + length]))
    return found


def far_rule(exits: tuple[int, ...], layers: int, far: float) -> MlpPolicy:
    """Who has more than ``far`` tokens ahead leaves at the first exit; the others at the next."""
    weight_F1 = np.zeros((PROMPT_V1.width, 1), np.float32)
    weight_F1[AHEAD] = 1
    weight_F1[DEPTH] = MUCH
    bias_1 = np.array([-far / SCALE - MUCH * exits[0] / layers], np.float32)
    return MlpPolicy(exits, PROMPT_V1, [(weight_F1, bias_1)])


def readings_of(
    model: Any, documents: Sequence[Sequence[int]], costs: CostTable, policy: ExitPolicy | None
) -> Readings:
    """Read each prompt with a policy for prompts, or in full (None), and score what follows."""
    prompts = None if policy is None else PromptExits(policy=policy)
    config = EngineConfig(prompts=prompts, prefill="full" if policy is None else "exits")
    engine = AdaptiveEngine(model, slots=4, config=config)
    requests = [submit_scored(engine, each[:PROMPT], each[PROMPT:]) for each in documents]
    done: dict[str, Any] = {}
    while len(done) < len(requests):
        engine.step(done)
    rows = [done[request.id] for request in requests]
    skipped_N = 1 - np.array([row.prompt_calls for row in rows]) / (PROMPT * costs.layers)
    prices = costs.at(1)
    return Readings(
        losses_N=np.array([nats_per_token(row) for row in rows]),
        saved_N=(1 - prices.fill_s / prices.layer_s) * skipped_N,
    )


def trained(
    model: Any,
    documents: Sequence[Sequence[int]],
    costs: CostTable,
    start: MlpPolicy,
    config: PromptPPOConfig,
) -> MlpPolicy:
    """PPO from the start rule, at one λ."""

    def open_session() -> PromptReadingSession:
        return PromptReadingSession(
            model, documents, prompt_tokens=PROMPT, following=FOLLOWING, exits=start.exits
        )

    def tell(done: int, steps: int) -> None:
        Console().print(f"{done} of {steps} decisions")

    agent = train_prompt_policy(open_session, costs, start, config, tell)
    return MlpPolicy(start.exits, PROMPT_V1, agent.weights(config.ppo.lambda_range[0]))


def interval(values_N: NDArray[np.float64]) -> tuple[float, float, float]:
    """A mean over documents and its 95 % interval, documents drawn anew."""
    rng = np.random.default_rng(0)
    means = values_N[rng.integers(len(values_N), size=(RESAMPLES, len(values_N)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values_N.mean()), float(low), float(high)


def row_of(
    name: str, found: Readings, learned: Readings, full: Readings, weight: float
) -> dict[str, Any]:
    """One line: what a policy loses and saves, and by how much the learned one's reward is more."""
    ahead_N = learned.rewards_N(full, weight) - found.rewards_N(full, weight)
    return {
        "policy": name,
        "saved": float(found.saved_N.mean()),
        "loss_more": interval(found.losses_N - full.losses_N),
        "reward": float(found.rewards_N(full, weight).mean()),
        "learned_ahead": interval(ahead_N),
    }


def save(policy: MlpPolicy, folder: Path, loaded: Any, model: str, config: PromptPPOConfig) -> None:
    """Write the bundle that ``offramp serve --prompt-policy`` takes."""
    canned_NF = np.random.default_rng(0).random((64, PROMPT_V1.width), np.float32)
    bundle = PolicyBundle.draft(
        pack_policy(policy, canned_NF),
        model=model_fingerprint(loaded),
        tokenizer=tokenizer_fingerprint(load_tokenizer(model)),
        training={"decisions": config.ppo.steps, "lambda": config.ppo.lambda_range[0]},
        metrics={},
        created_at=time.time(),
    )
    bundle.save(folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder for bundle and table.")],
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    exits: Annotated[str, typer.Option(help="Two layers to leave after, by comma.")] = "3,4",
    far: Annotated[float, typer.Option(help="Tokens ahead from which the first rule goes.")] = 256,
    weight: Annotated[float, typer.Option(help="λ, nats per share of the time.")] = 0.5,
    documents: Annotated[int, typer.Option(help="Training documents.")] = 48,
    held_out: Annotated[int, typer.Option(help="Test documents.")] = 48,
    steps: Annotated[int, typer.Option(help="Decisions that PPO learns from.")] = 400_000,
    seed: Annotated[int, typer.Option(help="Seeds the training.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few documents and decisions.")] = False,
) -> None:
    """Train, measure, and write ``policy/`` and ``rows.json``."""
    torch.set_num_threads(1)
    ppo = replace(PromptPPOConfig().ppo, steps=steps, lambda_range=(weight, weight), seed=seed)
    config = PromptPPOConfig(ppo=ppo)
    if quick:
        documents, held_out = 4, 4
        config = PromptPPOConfig(ppo=replace(ppo, steps=2048, rollout=512), shown=1024)
    loaded = load_model(model, torch.float32, "cpu")
    layers = loaded.config.num_hidden_layers
    costs = constants(layers)
    start = far_rule(tuple(int(each) for each in exits.split(",")), layers, far)
    policy = trained(loaded, stretches(model, "train", documents), costs, start, config)
    save(policy, out / "policy", loaded, model, config)
    held = stretches(model, "test", held_out)

    def read(by: ExitPolicy | None) -> Readings:
        return readings_of(loaded, held, costs, by)

    full, learned = read(None), read(policy)
    share = (learned.saved_N.mean() / full_saving(start.exits[1], layers) - 1) * (
        layers - start.exits[1]
    )
    others: dict[str, ExitPolicy] = {
        "the rule it began with": start,
        "all, exit 4": FixedExit(4),
        "as many at random": SomeThenAll(start.exits, float(np.clip(share, 0, 1)), layers),
        **{f"all, exit {each}": FixedExit(each) for each in (5, 6, 3)},
    }
    rows = [row_of("learned", learned, learned, full, weight)]
    for name, other in others.items():
        rows.append(row_of(name, read(other), learned, full, weight))
        Console(width=200).print(rows[-1])
    told = {"machine": describe_machine(loaded.dtype), "weight": weight, "rows": rows}
    (out / "rows.json").write_text(json.dumps(told, indent=1))


def constants(layers: int) -> CostTable:
    """Prices in layers; of these only layer and fill count here."""
    return CostTable(
        layer_s=1.0,
        head_s=1.0,
        probe_s=0.0,
        policy_s=0.0,
        fill_s=FILL,
        step_s=0.0,
        layers=layers,
        machine="constants",
    )


def full_saving(exit_: int, layers: int) -> float:
    """Share that is saved where all that are not kept leave at one exit."""
    kept = PromptExits(policy=FixedExit(exit_))
    asked = 1 - (kept.keep_first + kept.keep_last) / PROMPT
    return (1 - FILL) * asked * (layers - exit_) / layers


if __name__ == "__main__":
    typer.run(main)
