"""Teach policies for prompts: measure rules, train, choose on validation, report on test, save.

Shape suffixes: N prompts, F feature columns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.agents.evaluation.statistics import Estimate, bootstrap_ratio
from offramp.agents.placing.contenders import (
    CANNED_ROWS,
    CHOSEN,
    Contender,
    full_depth,
    save_policies,
)
from offramp.agents.prompting.first_rules import AnybodyElse, CountedExits
from offramp.agents.prompting.lesson import (
    FIXED,
    LEARNED,
    Progress,
    PromptLesson,
    as_exits,
    require_fitting,
)
from offramp.agents.prompting.prompt_checkpoint import PromptCheckpoint
from offramp.agents.prompting.prompt_config import PromptLessonConfig
from offramp.agents.prompting.prompt_report import PromptRow, lost_share, row_of, same_share
from offramp.agents.prompting.read_tasks import LessonPrompts, lesson_prompts
from offramp.controller.adapters.adapter_folder import keep_adapters
from offramp.controller.durable import write_durably
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.profiling.profile import describe_machine

REPORT = "prompts.json"
"""The table, beside the policies."""

RANDOM = "as many at random"
"""The control's name in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtPrompts:
    """What came of a lesson.

    Attributes:
        contenders: Full depth, fixed exits, the first rule, the learned policies, as saved.
        chosen: Place of the one that earned most on validation prompts; of equals the simplest.
        rows: Every policy on the test prompts, the control last.
        fixed_ahead: By how much the learned policy's reward is more than the best fixed exit's, on
            the test prompts; both are those that earned most on validation prompts.
        best_fixed: The name of that fixed exit.
        prompts: Number of prompts to learn from, to choose on, and to report on.
        fill: Measured price of a skipped layer's keys and values, in layers.
    """

    contenders: list[Contender]
    chosen: int
    rows: list[PromptRow]
    fixed_ahead: Estimate
    best_fixed: str
    prompts: tuple[int, int, int]
    fill: float


def teach_prompts(
    config: PromptLessonConfig,
    engine: AdaptiveEngine,
    out: Path,
    *,
    resume: bool = False,
    on_progress: Progress = lambda *_: None,
) -> TaughtPrompts:
    """Measure fixed exits, train from the best rule, choose, measure on test prompts, save.

    Args:
        config: Settings of the lesson.
        engine: The model with its tokenizer, idle.
        out: Folder of the policies' bundles, their index, the table and the checkpoint; the chosen
            policy is also in ``chosen``, and adapters that were given in ``translators``.
        resume: Go on from the checkpoint in ``out``: what was read and trained is not done again.
        on_progress: Told (stage, done so far, in all).

    Raises:
        ConfigError: exits that are no layers of the model, prompts beyond its context, a checkpoint
            that is missing or of other settings, or adapters that cannot be copied.
        TraceError: the corpus cannot be read, or has too few documents that are long enough.
        PolicyFaultError: a policy failed on a prompt.
    """
    torch.set_num_threads(config.threads)
    require_fitting(config, engine)
    settings = config.settings() | {
        "model": engine.model_fingerprint, "adapters": engine.decoder.translators.digest,
    }  # fmt: skip
    done = PromptCheckpoint.load(out) if resume else PromptCheckpoint(settings=settings)
    done.require(settings)
    prompts = lesson_prompts(config, engine.tokenizer)
    lesson = PromptLesson(config, engine, prompts, done, out, on_progress)
    fixed = lesson.fixed()
    start = lesson.first_rule(fixed)
    contenders = [full_depth(), *fixed, start, *lesson.learned(start)]
    rewards = _rewards(lesson, contenders)
    taught = _measured(lesson, contenders, rewards)
    _save(lesson, taught, settings, out)
    return taught


def _rewards(lesson: PromptLesson, contenders: Sequence[Contender]) -> list[float]:
    """Each contender's mean reward on the validation prompts; full depth, the first, has 0."""
    found = lesson.read("validation", contenders, "validation")
    worth = lesson.worth(found[0])
    return [float(worth.rewards_N(each).mean()) for each in found]


def _measured(
    lesson: PromptLesson, contenders: list[Contender], rewards: list[float]
) -> TaughtPrompts:
    """Report on the test prompts what was chosen on others."""
    chosen = _best(rewards, range(len(contenders)))
    learned, fixed = (
        _best(rewards, [n for n, each in enumerate(contenders) if each.family == family])
        for family in (LEARNED, FIXED)
    )
    control = _control(lesson, contenders[learned])
    everybody = [*contenders, control]
    found = lesson.read("test", everybody, "test")
    worth = lesson.worth(found[0])
    rows = [
        row_of(each.name, readings, found[learned], worth)
        for each, readings in zip(everybody, found, strict=True)
    ]
    finalists = sorted({chosen, learned, fixed, len(rows) - 2 - len(lesson.config.seeds)} - {0})
    finalists.append(len(rows) - 1)
    _add_lines_and_times(lesson, everybody, finalists, rows)
    prompts = lesson.prompts
    return TaughtPrompts(
        contenders=contenders,
        chosen=chosen,
        rows=rows,
        fixed_ahead=rows[fixed].learned_ahead,
        best_fixed=rows[fixed].name,
        prompts=(len(prompts.train), len(prompts.validation), len(prompts.test)),
        fill=worth.fill,
    )


def _best(rewards: Sequence[float], places: Sequence[int]) -> int:
    return max(places, key=lambda place: rewards[place])


def _control(lesson: PromptLesson, learned: Contender) -> Contender:
    """As many tokens at each exit as the learned policy lets go, but whichever."""
    policy = as_exits(learned)
    counted = CountedExits(policy, lesson.layers, **lesson.config.kept)
    lesson.meter.read(lesson.prompts.validation, counted)
    anybody = AnybodyElse(policy.exits, counted.shares, lesson.layers)
    return Contender(family=RANDOM, setting=None, offline_agreement=None, policy=anybody)


def _add_lines_and_times(
    lesson: PromptLesson,
    everybody: Sequence[Contender],
    finalists: Sequence[int],
    rows: list[PromptRow],
) -> None:
    """Complete the test prompts' lines under some of the policies, and time their first tokens."""
    tasks, policies = lesson.prompts.test, [as_exits(everybody[n]) for n in finalists]
    full = lesson.meter.complete(tasks, as_exits(everybody[0]))
    for done, (n, policy) in enumerate(zip(finalists, policies, strict=True), 1):
        lines = lesson.meter.complete(tasks, policy)
        rows[n] = replace(
            rows[n], similarity_lost=lost_share(lines, full), same_line=same_share(lines, full)
        )
        lesson.on_progress("lines", done, len(finalists))
    cpu_PN, wall_PN = lesson.meter.times(
        [task.stretch for task in tasks],
        policies,
        lambda *count: lesson.on_progress("clock", *count),
    )
    for place, n in enumerate(finalists, 1):
        rows[n] = replace(
            rows[n],
            time=bootstrap_ratio(cpu_PN[place], cpu_PN[0]),
            wall=bootstrap_ratio(wall_PN[place], wall_PN[0]),
        )


def _save(lesson: PromptLesson, taught: TaughtPrompts, settings: dict[str, Any], out: Path) -> None:
    """Write every contender's bundle, the chosen one's apart, the table, and the adapters."""
    engine = lesson.engine
    save_policies(
        out,
        taught.contenders,
        settings,
        lambda policy: _canned(lesson.meter, lesson.prompts, policy),
        (engine.model_fingerprint, engine.tokenizer_fingerprint),
        adapters=engine.decoder.translators.digest,
    )
    if engine.config.translators is not None:
        keep_adapters(engine.config.translators, out)
    PolicyBundle.load(out / f"{taught.chosen:02d}").save(out / CHOSEN)
    told = {
        "machine": describe_machine(next(engine.model.parameters()).dtype),
        "settings": settings,
        "prompts": taught.prompts,
        "fill": taught.fill,
        "chosen": taught.contenders[taught.chosen].name,
        "rows": [asdict(row) for row in taught.rows],
    }
    write_durably(out / REPORT, json.dumps(told, indent=1).encode())


def _canned(meter: Any, prompts: LessonPrompts, policy: Policy) -> FloatArray:
    """Evenly spaced rows of what a policy reads of a prompt."""
    if policy.schema is None:
        return np.empty((CANNED_ROWS, 0), np.float32)
    rows_NF: FloatArray = meter.seen(prompts.validation[0], policy.exits)
    return rows_NF[:: max(1, len(rows_NF) // CANNED_ROWS)][:CANNED_ROWS].copy()
