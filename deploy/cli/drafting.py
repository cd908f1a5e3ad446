"""Run ``offramp train --for drafting``: when to draft, when to verify, and nothing lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.agents.drafting.teach import Taught, teach_drafters, time_drafting
from offramp.agents.placing.contenders import CHOSEN
from offramp.agents.recording.own_text import OWN_TEXT, only_texts
from offramp.agents.training.train_config import load_config
from offramp.controller.policies.exits import copy_weights
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, keeping, progress
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.precision import Precision
from offramp.worker.spec import WorkerSpec, load_engine

TIMED = 10
"""Validation documents that the chosen drafter is timed on."""

TIMED_TOKENS = 64
"""Tokens decoded of each."""


def teach(path: Path | None, config: DraftingConfig, steps: int, out: Path) -> None:
    """Teach drafters, and say how fast the chosen one decodes.

    Args:
        path: TOML file that replaces all settings; None takes those given.
        config: Settings of the command line.
        steps: Decisions of PPO's training, likewise.
        out: New folder for the drafters.

    Raises:
        ConfigError: an option is unusable.
        ModelError: the model cannot be loaded.
        TraceError: the corpus cannot be used.
    """
    if path is not None:
        config = load_config(path, DraftingConfig)
    else:
        config = replace(config, ppo=replace(config.ppo, steps=steps))
    # Cut off while the model wrote its texts, it just goes on.
    if not only_texts(out):
        options.require_new_folder("out", out)
    engine = load_engine(
        WorkerSpec(
            model=config.model,
            dtype=config.dtype,
            threads=config.threads,
            slots=1,
            engine=_engine_of(config),
        )
    )
    taught, ratio = teach_and_time(config, engine, out)
    console.print(
        f"decoded: {ratio:.2f} × full depth at batch 1 on {len(taught.prompts[:TIMED])} validation "
        f"documents, every token full depth's → {out / CHOSEN}"
    )


def teach_and_time(
    config: DraftingConfig, engine: AdaptiveEngine, out: Path
) -> tuple[Taught, float]:
    """Teach drafters, print what replay says of each, and decode with the chosen one.

    Args:
        config: Settings of the lesson.
        engine: The model, idle; greedy, one row at a time.
        out: New folder for the drafters.

    Returns:
        The drafters, and how many times as fast as full depth the chosen one decoded.

    Raises:
        ConfigError, TraceError: as ``teach_drafters``.
        PolicyFaultError: some output was not full depth's, token for token.
    """
    with keeping(out / OWN_TEXT), progress("record", "") as advance:
        taught = teach_drafters(
            config, engine, out, lambda stage, done, total: advance(done, total, stage)
        )
    for number, each in enumerate(taught.contenders[1:], 1):
        mark = "← chosen" if number == taught.chosen else ""
        rate = 1 / (each.offline_cost or 1.0)
        console.print(f"  {each.name}: {rate:.3f} × full depth by replay {mark}")
    chosen = taught.contenders[taught.chosen].policy
    return taught, time_drafting(engine, chosen, taught.prompts[:TIMED], TIMED_TOKENS)


def _engine_of(config: DraftingConfig) -> EngineConfig:
    """An engine with what exits are read through, and the copy which they are on, if any are."""
    weights = copy_weights(config.exits)
    return EngineConfig(
        draft_precision=None if weights is None else Precision.for_drafts(weights),
        translators=Path(config.translators) if config.translators else None,
    )
