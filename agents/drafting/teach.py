"""Teach drafters for one model on this machine: train, choose, save, and time the chosen one.

Lossless: in ``verify`` the output is full depth's whatever a drafter does, so that speed alone is
learned. docs/lossless.md has the method and the numbers.

Shape suffixes: N rows, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.agents.drafting.draft_chances import odds_of, trusted_grid
from offramp.agents.drafting.draft_net import router_of
from offramp.agents.drafting.draft_parts import DraftingConfig, DraftParts, Progress, record_parts
from offramp.agents.drafting.draft_ppo import train_drafter
from offramp.agents.drafting.draft_replay import bounds, confident_grid, ranked, replay_drafts
from offramp.agents.placing.contenders import CANNED_ROWS, CHOSEN, Contender, save_policies
from offramp.agents.training.families import DRAFT_FAMILIES, place_all, register
from offramp.controller.adapters.adapter_folder import keep_adapters
from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import FloatArray
from offramp.controller.policies.drafts import ConfidentDraft, ThompsonDraft, TrustedDraft
from offramp.controller.policies.exits import exit_to_json
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine

TIMED = 10
"""Validation documents that drafters are timed on."""

TIMED_TOKENS = 64
"""Tokens decoded of each."""

PLACES = ("model", "corpus", "translators")
"""Settings that say where things lie on one machine."""

CONFIDENT = "headless confidence stop"
TRUSTED = "headless trust stop"
THOMPSON = "Thompson sampling"
DRAFTER = "PPO drafting"


@register(CONFIDENT, goal="drafting")
def _confident(parts: DraftParts) -> list[Contender]:
    """Place Kangaroo's rule at the exit and threshold that are fastest on validation documents."""
    most = parts.config.ppo.max_pending
    best = confident_grid(parts.validation, parts.costs, parts.candidates_VK, most)[0]
    policy = best.policy
    assert isinstance(policy, ConfidentDraft)
    return [_stop(CONFIDENT, "η=", policy, policy.layer, best.offline.rate)]


@register(TRUSTED, goal="drafting")
def _trusted(parts: DraftParts) -> list[Contender]:
    """Place the stop by trust at the exit and threshold that are fastest on validation."""
    found = trusted_grid(
        parts.fitted.chances,
        parts.validation,
        parts.costs,
        parts.candidates_VK,
        parts.config.ppo.max_pending,
    )
    policy = found[0].policy
    assert isinstance(policy, TrustedDraft)
    return [_stop(TRUSTED, "θ=", policy, policy.exits[0], found[0].offline.rate)]


def _stop(
    family: str, symbol: str, policy: ConfidentDraft | TrustedDraft, exit_: int, rate: float
) -> Contender:
    """A stop at an exit, with the rate that it earns by replay."""
    return Contender(
        family=family if policy.candidates_VK is not None else family.split(" ", 1)[1],
        setting=policy.threshold,
        offline_agreement=1.0,
        policy=policy,
        offline_cost=1 / rate,
        symbol=symbol,
        note=f" at {exit_}",
    )


@register(THOMPSON, goal="drafting")
def _thompson(parts: DraftParts) -> list[Contender]:
    """Draft with the head as often as drafts were right, at the fastest exit; none headless."""
    if parts.candidates_VK is not None:
        return []
    most = parts.config.ppo.max_pending
    tried = [
        (str(layer), ThompsonDraft(layer, length=length, max_pending=most))
        for layer in parts.validation.header.exits
        for length in bounds(most)
    ]
    best = ranked(tried, parts.validation, parts.costs, most)[0]
    return [
        Contender(
            family=THOMPSON,
            setting=float(best.policy.exits[0]),
            offline_agreement=1.0,
            policy=best.policy,
            offline_cost=1 / best.offline.rate,
            symbol="exit ",
        )
    ]


@register(DRAFTER, goal="drafting", is_seeded=True)
def _drafter(parts: DraftParts) -> list[Contender]:
    """PPO that says at each exit, and before the first layer, whether to draft or to verify."""
    ppo = parts.config.ppo
    model = train_drafter(
        parts.train,
        parts.costs,
        parts.fitted,
        ppo,
        lambda done, _: parts.on_progress("PPO", min(done, ppo.steps), ppo.steps),
        parts.candidates_VK,
    )
    exits = parts.train.header.exits
    chances = parts.fitted.chances
    router = router_of(model, chances, exits, ppo.max_pending, parts.candidates_VK)
    odds_NE = odds_of(chances, parts.validation)
    rate = replay_drafts(router, parts.validation, parts.costs, ppo.max_pending, odds_NE).rate
    return [
        Contender(
            family=DRAFTER,
            setting=float(ppo.seed),
            offline_agreement=1.0,
            policy=router,
            offline_cost=1 / rate,
            symbol="seed ",
        )
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What came of teaching.

    Attributes:
        contenders: Full depth, then the best drafter of each family by replay, as they were saved.
        speeds: How many times as fast as full depth each decoded validation documents; 1 for it.
        timed: Documents that they were timed on.
    """

    contenders: list[Contender]
    speeds: list[float]
    timed: int

    @property
    def chosen(self) -> int:
        """Place of the fastest drafter by the clock."""
        return max(range(1, len(self.speeds)), key=self.speeds.__getitem__)


def teach_drafters(
    config: DraftingConfig,
    engine: AdaptiveEngine,
    out: Path,
    on_progress: Progress = lambda *_: None,
) -> Taught:
    """Record the model's own continuations, measure costs, train, choose on validation, save.

    Replay chooses each family's setting, the clock among the families: replay knows no more of a
    step than was profiled, and what it promises is kept by some more than by others.

    Args:
        config: Settings of the lesson.
        engine: The model, idle; greedy, one row at a time.
        out: Folder of the drafters' bundles and their index; the chosen one is also in ``chosen``,
            and adapters that exits are read through in ``translators``.
        on_progress: Told (stage, done so far, in all).

    Raises:
        ConfigError: exits that are no layers of the model, continuations beyond its context, or
            adapters that cannot be copied.
        TraceError: the corpus cannot be read, or has too few documents longer than a prompt.
        PolicyFaultError: some output was not full depth's, token for token.
    """
    torch.set_num_threads(config.threads)
    config = replace(config, ppo=replace(config.ppo, seed=config.seed))
    parts, prompts = record_parts(config, engine, out, on_progress)
    contenders = place_all(DRAFT_FAMILIES, parts)
    rows_NF = parts.train.features_NEF.reshape(-1, parts.train.features_NEF.shape[2])
    save_policies(
        out,
        contenders,
        {name: value for name, value in _settings(config).items() if name not in PLACES},
        lambda policy: _canned(policy, rows_NF),
        (engine.model_fingerprint, engine.tokenizer_fingerprint),
        adapters=engine.decoder.translators.digest,
    )
    if engine.config.translators is not None:
        keep_adapters(engine.config.translators, out)
    policies = [each.policy for each in contenders]
    speeds = time_drafting(
        engine, policies, prompts[:TIMED], lambda *count: on_progress("clock", *count)
    )
    taught = Taught(contenders=contenders, speeds=speeds, timed=len(prompts[:TIMED]))
    PolicyBundle.load(out / f"{taught.chosen:02d}").save(out / CHOSEN)
    return taught


def _settings(config: DraftingConfig) -> dict[str, Any]:
    """Settings as JSON has them."""
    return asdict(config) | {"exits": list(map(exit_to_json, config.exits))}


def time_drafting(
    engine: AdaptiveEngine,
    policies: Sequence[Policy],
    prompts: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[float]:
    """Decode every prompt at full depth and under drafters, in turn; times full depth's speed.

    Args:
        engine: The model, idle; greedy, one row at a time.
        policies: Full depth first.
        prompts: Token ids of each.
        on_progress: Told (prompts done, in all).

    Raises:
        PolicyFaultError: some output was not full depth's, token for token.
    """
    sampling = SamplingParams(max_tokens=TIMED_TOKENS, ignore_eos=True)
    seconds = [0.0] * len(policies)
    for done, prompt in enumerate(prompts, 1):
        texts = []
        for place, policy in enumerate(policies):
            start = time.perf_counter()
            [decoded] = engine.generate([list(prompt)], sampling, policy, kv_mode="verify")
            seconds[place] += time.perf_counter() - start
            texts.append(list(decoded.token_ids))
        if any(text != texts[0] for text in texts):
            raise PolicyFaultError("its output in verify is not full depth's")
        on_progress(done, len(prompts))
    return [seconds[0] / each for each in seconds]


def _canned(policy: Policy, rows_NF: FloatArray) -> FloatArray:
    if policy.schema is None:
        return np.empty((CANNED_ROWS, 0), np.float32)
    return rows_NF[:CANNED_ROWS]
