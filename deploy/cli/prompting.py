"""Run ``offramp train --for prompts``: which tokens of a prompt leave, and what is lost by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from offramp.agents.evaluation.statistics import Estimate
from offramp.agents.placing.contenders import CHOSEN
from offramp.agents.prompting.prompt_config import PromptLessonConfig
from offramp.agents.prompting.prompt_meter import SLOTS
from offramp.agents.prompting.teach_prompts import REPORT, TaughtPrompts, teach_prompts
from offramp.agents.training.train_config import load_config
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, keeping, progress, say
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.spec import WorkerSpec, load_engine

PROMPTS = "prompts"
"""What ``offramp train --for`` calls it."""

WEIGHT = 0.5
"""What all of a prompt's time is worth, in nats per token, where nobody says."""

Steps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="PPO environment steps; with --for classify, 0 leaves PPO out.",
        show_default="1500000; for prompts 49152",
    ),
]
Weight = Annotated[
    float, typer.Option(help="With --for prompts: what all of a prompt's time is worth, in nats.")
]


def prompt_lesson(asked: Mapping[str, Any]) -> PromptLessonConfig:
    """How policies for prompts are taught, from the options of the command, or from its file.

    Raises:
        ConfigError: an option is unusable.
    """
    if asked["config"] is not None:
        return load_config(asked["config"], PromptLessonConfig)
    seeds = options.parse_list("seeds", asked["seeds"], int, "seeds", "0,1")
    if seeds and asked["seed"]:
        raise ConfigError("seed", "does not go with --seeds", "Leave it out")
    config = PromptLessonConfig(
        model=asked["model"],
        corpus=str(asked["corpus"] or ""),
        translators=str(asked["translators"] or ""),
        dtype=asked["dtype"] or "float32",
        exits=options.parse_layers("exits", asked["exits"]),
        weight=asked["weight"],
        seeds=seeds or (asked["seed"],),
        threads=asked["threads"],
    )
    return config if asked["steps"] is None else replace(config, steps=asked["steps"])


def teach_prompts_here(asked: Mapping[str, Any], out: Path) -> None:
    """Teach policies for prompts, and say what each is worth on held-out prompts.

    Args:
        asked: Options of ``offramp train``, by name.
        out: Folder of the policies; a new one, unless an earlier run is gone on with.

    Raises:
        ConfigError: an option is unusable.
        ModelError: the model cannot be loaded.
        TraceError: the corpus cannot be used.
        PolicyFaultError: a policy failed on a prompt.
    """
    config, resume = prompt_lesson(asked), asked["resume"]
    if not resume:
        options.require_new_folder("out", out)
    engine = load_engine(
        WorkerSpec(
            model=config.model,
            dtype=config.dtype,
            threads=config.threads,
            slots=SLOTS,
            engine=EngineConfig(
                translators=Path(config.translators) if config.translators else None
            ),
        )
    )
    with keeping(out, "--resume goes on"), progress("fixed exits", "") as advance:
        taught = teach_prompts(
            config,
            engine,
            out,
            resume=resume,
            on_progress=lambda stage, done, total: advance(done, total, stage),
        )
    console.print(prompts_table(taught))
    console.print(lines_table(taught))
    say(verdict(taught))
    say(f"{len(taught.contenders)} policies, the table as {REPORT} → {out}; chosen: {out / CHOSEN}")


def prompts_table(taught: TaughtPrompts) -> Table:
    """What every policy saves and loses on the test prompts; the arrow marks the chosen one."""
    learn, choose, test = taught.prompts
    title = (
        f"{test} test prompts (learned from {learn}, chosen on {choose}); loss in nats per token; "
        f"a fill costs {taught.fill:.3f} of a layer"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("policy")
    for name in ("saved", "loss +", "reward", "learned is ahead by"):
        table.add_column(name, justify="right", no_wrap=True)
    chosen = taught.contenders[taught.chosen].name
    for row in taught.rows:
        table.add_row(
            f"{row.name} ←" if row.name == chosen else row.name,
            f"{row.saved:.3f}",
            _signed(row.loss_more),
            f"{row.reward:.3f}",
            _signed(row.learned_ahead),
            style="bold" if row.name == chosen else None,
        )
    return table


def lines_table(taught: TaughtPrompts) -> Table:
    """Completed lines and times to the first token of those that are compared further."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy")
    for name in (
        "edit similarity lost",
        "same line",
        "first token, CPU time ÷ full",
        "by the wall",
    ):
        table.add_column(name, justify="right")
    for row in taught.rows:
        if row.time is None or row.wall is None or row.same_line is None:
            continue
        lost = row.similarity_lost
        table.add_row(
            row.name,
            "–" if lost is None else f"{lost.value:.1%} [{lost.low:.0%}, {lost.high:.0%}]",
            f"{row.same_line:.0%}",
            *(
                f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"
                for each in (row.time, row.wall)
            ),
        )
    return table


def verdict(taught: TaughtPrompts) -> str:
    """Which policy was chosen, and whether learning is shown to be ahead of the best fixed exit."""
    ahead, fixed = taught.fixed_ahead, taught.best_fixed
    if ahead.low > 0:
        shown = f"learning is ahead of {fixed}"
    elif ahead.high < 0:
        shown = f"learning is behind {fixed}"
    else:
        shown = f"learning is not shown to be ahead of {fixed}, nor behind"
    return (
        f"chosen on validation prompts: {taught.contenders[taught.chosen].name}; on test prompts "
        f"{shown} ({_signed(ahead)})"
    )


def _signed(each: Estimate) -> str:
    return f"{each.value:+.3f} [{each.low:+.3f}, {each.high:+.3f}]"
