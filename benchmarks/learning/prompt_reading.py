"""What exits in the prompt are worth: time to the first token against what follows, by policy.

Prompts are cut from held-out documents of the standard library, in mid-line. Each is
read in full and with exits, in turn, on one thread, alone and in fours: what counts is processor
time (on a shared machine the wall clock says more of its neighbours; it is reported, too). What
follows is scored twice: by the loss of the document's own next tokens, teacher-forced at full
depth, and by the edit similarity of the completed line. A needle, a constant that is given a value
and is asked for behind other code, tells whether what stands further back is still found, and by
the loss of its value's tokens how nearly, since a small model seldom finds it at any depth.

    PYTHONPATH=benchmarks python benchmarks/learning/prompt_reading.py   # --quick: a sixth
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from shared.prompt_tasks import ReadOutcome, needles_of, outcome_of, tasks_of

from offramp.agents.prompting.prompt_meter import FIRST_TOKEN, StateWatcher
from offramp.agents.prompting.read_tasks import ReadTask
from offramp.controller.features import PROMPT_V1
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, NeverExit, ThresholdPolicy
from offramp.controller.policies.rules.prompt_rules import RandomShare, WindowedExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine, EngineConfig, PromptExits
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.model.loading import load_model, load_tokenizer
from offramp.worker.profiling.profile import describe_machine

SCORES = ("losses", "similarities", "needles", "found")
RESAMPLES = 2000
ASKED = 12
"""Needles."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read prompts: a policy for them (None: in full), and how many tokens stay."""

    name: str
    policy: ExitPolicy | None
    keep_last: int = 32

    def engine(self, model: Any, tokenizer: Any, translators: Path | None) -> AdaptiveEngine:
        """An engine that reads so, and in full where that is asked for."""
        if self.policy is None:
            config = EngineConfig(translators=translators)
        else:
            prompts = PromptExits(policy=self.policy, keep_last=self.keep_last)
            config = EngineConfig(prefill="exits", prompts=prompts, translators=translators)
        return AdaptiveEngine(model, tokenizer, slots=4, config=config)


def times_of(
    engine: AdaptiveEngine, tasks: Sequence[ReadTask], batch: int, rounds: int
) -> NDArray[np.float64]:
    """Ratios of the times to the first tokens, with exits over full, [rounds, 2]: CPU, wall."""
    prompts = [list(task.line.prompt) for task in tasks]
    ratios = []
    for number in range(rounds):
        some = [prompts[(number * batch + place) % len(prompts)] for place in range(batch)]
        ways: tuple[Prefill, ...] = ("full", "exits", "full")
        taken = [_taken(engine, some, way) for way in ways]
        around = np.mean([taken[0], taken[2]], axis=0)
        ratios.append(np.array(taken[1]) / around)
    return np.array(ratios)


def _taken(engine: AdaptiveEngine, prompts: list[list[int]], way: Prefill) -> tuple[float, float]:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    engine.generate(prompts, FIRST_TOKEN, NeverExit(), prefill=way)
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


def quantiles(
    engine_of: Any, tasks: Sequence[ReadTask], layer: int, shares: Sequence[float]
) -> list[float]:
    """Cosines after a layer that so many of the prompts' tokens reach."""
    recorder = StateWatcher((layer,))
    engine = engine_of(Reading("", recorder))
    engine.generate([list(task.line.prompt) for task in tasks], FIRST_TOKEN, NeverExit())
    cosines_N = np.concatenate(recorder.rows)[:, PROMPT_V1.index("cosine")]
    return [float(np.quantile(cosines_N, 1 - share)) for share in shares]


def readings_of(
    engine_of: Any,
    tasks: Sequence[ReadTask],
    exits: Sequence[int],
    choices: Sequence[int],
    bundles: Sequence[Path],
) -> list[Reading]:
    """The ways that are compared, after full depth: by exit, and by whom is let go at some."""
    made = [
        Reading(f"fixed exit {layer}", FixedExit(layer), last)
        for layer, last in itertools.product(exits, (8, 32, 128))
    ]
    for layer in choices:
        windows = WindowedExit(exits=(layer,), window=32)
        made.append(Reading(f"every second window of 32, exit {layer}", windows))
        shares = (0.5, 0.75)
        cosines = quantiles(engine_of, tasks[:4], layer, shares)
        for share, cosine in zip(shares, cosines, strict=True):
            random = RandomShare(exits=(layer,), share=share)
            saturated = ThresholdPolicy((layer,), PROMPT_V1, "cosine", cosine)
            made.append(Reading(f"random {share:.0%}, exit {layer}", random))
            made.append(Reading(f"saturated {share:.0%}, exit {layer}", saturated))
        seen = ThresholdPolicy((layer,), PROMPT_V1, "seen", 0.5)
        made.append(Reading(f"seen before, exit {layer}", seen))
    for folder in bundles:
        policy = PolicyBundle.load(folder).policy()
        assert isinstance(policy, ExitPolicy)
        made.append(Reading(folder.name, policy))
    return made


def with_interval(
    tasks: Sequence[ReadTask],
    values_N: NDArray[np.float64],
    per_N: NDArray[np.float64] | None = None,
) -> tuple[float, float, float]:
    """A mean (or a ratio of sums) over tasks and its 95 % interval, documents drawn anew."""
    documents_N = np.array([task.document for task in tasks])
    per_N = np.ones(len(values_N)) if per_N is None else per_N
    names = np.unique(documents_N)
    sums_D2 = np.array([[v[documents_N == d].sum() for v in (values_N, per_N)] for d in names])
    rng = np.random.default_rng(0)
    drawn = sums_D2[rng.integers(len(names), size=(RESAMPLES, len(names)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return float(values_N.sum() / per_N.sum()), float(low), float(high)


def row_of(
    reading: Reading, tasks: Sequence[ReadTask], found: ReadOutcome, full: ReadOutcome
) -> dict[str, Any]:
    """One line of the table."""
    lost_N = full.similarities_N - found.similarities_N
    return {
        "reading": reading.name,
        "keep_last": reading.keep_last,
        "layer_tokens": found.layer_tokens,
        "loss": float(found.losses_N.mean()),
        "loss_more": with_interval(tasks, found.losses_N - full.losses_N),
        "similarity": float(found.similarities_N.mean()),
        "similarity_lost": with_interval(tasks, lost_N, full.similarities_N),
        "same": float(np.mean([a == b for a, b in zip(found.texts, full.texts, strict=True)])),
        "needle_loss_more": with_interval(tasks[:ASKED], found.needles_N - full.needles_N),
        "needles_found": float(found.found_N.mean()),
    }


def times_in(ratios: NDArray[np.float64], batch: int) -> dict[str, Any]:
    """Median and quartiles of the rounds' ratios."""
    quarters = np.quantile(ratios, (0.5, 0.25, 0.75), axis=0)
    return {f"cpu_{batch}": quarters[:, 0].tolist(), f"wall_{batch}": quarters[:, 1].tolist()}


def main(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    translators: Annotated[Path | None, typer.Option(help="Folder with a map.")] = None,
    documents: Annotated[int, typer.Option(help="Test documents.")] = 60,
    lines: Annotated[int, typer.Option(help="Lines of each.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each batch size.")] = 12,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    distance: Annotated[int, typer.Option(help="Tokens from a needle to its question.")] = 100,
    exits: Annotated[str, typer.Option(help="Exits that all leave at, by comma.")] = "2,3,4,6,9",
    choices: Annotated[str, typer.Option(help="Exits that some leave at, by comma.")] = "3,6",
    only: Annotated[
        str, typer.Option(help="Readings whose name and kept tokens hold one of these (;).")
    ] = "",
    bundles: Annotated[str, typer.Option(help="Bundles to measure, too, by comma.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    quick: Annotated[bool, typer.Option(help="A sixth of the prompts.")] = False,
) -> None:
    torch.set_num_threads(1)
    if quick:
        documents, rounds = max(2, documents // 6), max(2, rounds // 3)
    loaded = load_model(model, getattr(torch, dtype), "cpu")
    tokenizer = load_tokenizer(model)
    tasks = tasks_of(model, documents, lines, tokens)
    needles = needles_of(tokenizer, tasks[:ASKED], distance)

    def engine_of(reading: Reading) -> AdaptiveEngine:
        return reading.engine(loaded, tokenizer, translators)

    full = outcome_of(engine_of(Reading("full depth", None)), tasks, needles)
    folders = [Path(each) for each in bundles.split(",") if each]
    wanted = [each for each in only.split(";") if each]
    rows = []
    all_at, some_at = ([int(n) for n in each.split(",") if n] for each in (exits, choices))
    for reading in readings_of(engine_of, tasks, all_at, some_at, folders):
        if wanted and not any(each in f"{reading.name} {reading.keep_last}" for each in wanted):
            continue
        engine = engine_of(reading)
        row = row_of(reading, tasks, outcome_of(engine, tasks, needles), full)
        for batch in (1, 4):
            row |= times_in(times_of(engine, tasks, batch, max(2, rounds // batch)), batch)
        rows.append(row)
        Console(width=200).print(row)
    show(rows, full)
    told = {
        "machine": describe_machine(loaded.dtype),
        "tasks": len(tasks),
        "tokens": tokens,
        "distance": distance,
        "full": {name: float(getattr(full, f"{name}_N").mean()) for name in SCORES},
        "rows": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(told, indent=1))


def show(rows: list[dict[str, Any]], full: ReadOutcome) -> None:
    """Print the table."""
    loss, similarity = full.losses_N.mean(), full.similarities_N.mean()
    title = f"full depth: loss {loss:.3f}, edit similarity {similarity:.3f}, "
    title += f"needles {full.needles_N.mean():.3f}, {full.found_N.mean():.0%} found"
    table = Table(title=title)
    for name in (
        "reading",
        "kept",
        "layers",
        "CPU 1",
        "CPU 4",
        "loss +",
        "similarity lost",
        "same",
    ):
        table.add_column(name)
    table.add_column("needle +")
    table.add_column("found")
    for row in rows:
        lost, more = row["similarity_lost"], row["loss_more"]
        table.add_row(
            row["reading"],
            str(row["keep_last"]),
            f"{row['layer_tokens']:.2f}",
            *(f"{row[name][0]:.2f}" for name in ("cpu_1", "cpu_4")),
            f"{more[0]:+.3f} ({more[1]:+.3f} to {more[2]:+.3f})",
            f"{lost[0]:+.1%} ({lost[1]:+.1%} to {lost[2]:+.1%})",
            f"{row['same']:.0%}",
            f"{row['needle_loss_more'][0]:+.3f}",
            f"{row['needles_found']:.0%}",
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
