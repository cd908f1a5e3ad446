"""Run ``offramp train --for drafting``: when to draft, when to verify, and nothing lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.agents.drafting.likely_exits import best_of, likely_exits
from offramp.agents.drafting.teach import Taught, teach_drafters
from offramp.agents.placing.contenders import CHOSEN
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.own_text import OWN_TEXT, only_texts
from offramp.agents.training.train_config import load_config
from offramp.controller.policies.exits import Exit, copy_weights
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, keeping, progress, say
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.precision import Precision
from offramp.worker.spec import WorkerSpec, load_engine


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
    if not config.exits:
        config, engine = with_exits(config, engine)
    taught = teach_and_tell(config, engine, out)
    console.print(
        f"decoded: {taught.speeds[taught.chosen]:.2f} × full depth at batch 1 on the "
        f"{taught.timed} validation documents that chose it, every token full depth's → "
        f"{out / CHOSEN}"
    )


def teach_and_tell(config: DraftingConfig, engine: AdaptiveEngine, out: Path) -> Taught:
    """Teach drafters, and print how fast each is, by replay and by the clock.

    Args:
        config: Settings of the lesson.
        engine: The model, idle; greedy, one row at a time.
        out: New folder for the drafters.

    Raises:
        ConfigError, TraceError, PolicyFaultError: as ``teach_drafters``.
    """
    with keeping(out / OWN_TEXT), progress("record", "") as advance:
        taught = teach_drafters(
            config, engine, out, lambda stage, done, total: advance(done, total, stage)
        )
    for number, each in enumerate(taught.contenders[1:], 1):
        mark = "← chosen" if number == taught.chosen else ""
        rate = 1 / (each.offline_cost or 1.0)
        clocked = f"{taught.speeds[number]:.2f} by the clock"
        console.print(f"  {each.name}: {rate:.3f} × full depth by replay, {clocked} {mark}")
    return taught


def with_exits(
    config: DraftingConfig, engine: AdaptiveEngine
) -> tuple[DraftingConfig, AdaptiveEngine]:
    """Draft where this model is likely to gain by it; if at no exit, on a copy of its layers.

    Returns:
        The settings with their exits, and an engine that has them.

    Raises:
        TraceError: the corpus cannot be used.
    """
    corpus = load_corpus(Path(config.corpus) if config.corpus else None, config.documents)
    looked = likely_exits(engine, [each for each in corpus if each.split == "train"])
    best = max(looked, key=lambda each: each.rate)
    most = f"{best.agreement:.0%} of tokens right after {best.layer} layers"
    if best.pays:
        exits = best_of([each for each in looked if each.pays])
        say(f"exits: {', '.join(map(str, exits))} (likeliest to pay: {most})")
        return replace(config, exits=exits), engine
    say(
        f"no exit of this model is likely to pay by itself ({most}): drafts are made by an int4 "
        "copy of all layers. --exits names others; `offramp tune --kind layer` trains some"
    )
    config = replace(config, exits=(Exit(engine.stack.layers, "int4"),), candidates=0)
    own = replace(engine.config, draft_precision=_engine_of(config).draft_precision)
    return config, AdaptiveEngine(engine.model, engine.tokenizer, slots=1, config=own)


def _engine_of(config: DraftingConfig) -> EngineConfig:
    """An engine with what exits are read through, and the copy which they are on, if any are."""
    weights = copy_weights(config.exits)
    return EngineConfig(
        draft_precision=None if weights is None else Precision.for_drafts(weights),
        translators=Path(config.translators) if config.translators else None,
        max_pending=config.ppo.max_pending,
    )
