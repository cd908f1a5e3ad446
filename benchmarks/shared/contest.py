"""Contenders that decode the same documents in turn, and what they are worth against each other.

Shape suffixes: S seeds, D documents.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from shared.timing import Report

RESAMPLES = 5000


@dataclass
class Entry:
    name: str
    run: Callable[[list[int]], Report]
    offline: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)
    """Whether it emitted the first contender's tokens, by prompt."""


@dataclass
class ContestRow:
    policy: str
    seeds: int
    offline_rate: float | None
    tokens_per_s: float
    ratio_full: float
    ratio_full_low: float
    ratio_full_high: float
    ratio_static: float
    ratio_static_low: float
    ratio_static_high: float
    cpu_ratio_static: float
    cpu_ratio_static_low: float
    cpu_ratio_static_high: float
    drafts_per_cycle: float | None
    accepted: float | None
    layers_per_token: float | None
    decision_share: float | None
    equal: float | None
    """Share of prompts whose tokens were the first contender's."""


def compare(contenders: list[Entry], prompts: list[list[int]]) -> None:
    """Run all on all prompts in turn; the first prompt only warms up.

    Processor time, unlike the clock, counts the reading of the prompt, alike for all of ours.
    """
    for index, prompt in enumerate([prompts[0], *prompts]):
        for turn in range(len(contenders)):
            each = contenders[(turn + index) % len(contenders)]
            cpu = time.process_time()
            report = each.run(prompt)
            cpu = time.process_time() - cpu
            if index > 0:
                each.seconds.append(report.seconds)
                each.cpu_s.append(cpu)
                each.tokens.append(report.tokens)
                each.reports.append(report)
        if index > 0:
            for each in contenders:
                same = each.reports[-1].emitted == contenders[0].reports[-1].emitted
                each.equal.append(same)


def require_equal(contenders: list[Entry]) -> None:
    """Refuse what is not the first contender's output, token for token."""
    for each in contenders:
        assert all(each.equal), f"{each.name} is not lossless"


def rows_of(contenders: list[Entry], static: str) -> list[ContestRow]:
    full = contenders[0]
    [base] = [each for each in contenders if each.name == static]
    groups: dict[str, list[Entry]] = {}
    for each in contenders:
        groups.setdefault(each.name.partition(", seed")[0], []).append(each)
    rng = np.random.default_rng(0)
    rows = []
    for name, members in groups.items():
        seconds_SD = np.array([each.seconds for each in members])
        cpu_SD = np.array([each.cpu_s for each in members])
        offline = [each.offline for each in members if each.offline is not None]
        per_full = interval(np.array(full.seconds), seconds_SD, rng)
        per_static = interval(np.array(base.seconds), seconds_SD, rng)
        tokens_per_s = float(np.mean(members[0].tokens) / seconds_SD.mean())
        per_cpu = interval(np.array(base.cpu_s), cpu_SD, rng)
        earned = float(np.mean(offline)) if offline else None
        rows.append(ContestRow(name, len(members), earned, tokens_per_s, *per_full, *per_static,
                        *per_cpu, *details(members)))  # fmt: skip
    return rows


def interval(
    base_D: NDArray[np.float64], seconds_SD: NDArray[np.float64], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Speed-up over a baseline, documents and seeds drawn with replacement, 95 %."""
    seeds, documents = seconds_SD.shape
    draws = rng.integers(documents, size=(RESAMPLES, documents))
    seed_draws = rng.integers(seeds, size=(RESAMPLES, seeds))
    below = np.array([seconds_SD[s][:, d].mean(0).sum() for s, d in zip(seed_draws, draws,
                                                                       strict=True)])  # fmt: skip
    low, high = np.percentile(base_D[draws].sum(1) / below, [2.5, 97.5])
    return float(base_D.sum() / seconds_SD.mean(0).sum()), float(low), float(high)


def details(members: list[Entry]) -> tuple[float | None, ...]:
    reports = [report for each in members for report in each.reports]
    done = [row for report in reports for row in report.rows]
    equal = float(np.mean([each.equal for each in members]))
    if not done:
        return (None, None, None, None, equal)
    drafts = sum(row.drafts_made for row in done)
    accepted = sum(row.drafts_accepted for row in done)
    tokens = sum(report.tokens for report in reports)
    return (
        drafts / (tokens - accepted),
        accepted / drafts if drafts else None,
        sum(row.layer_calls for row in done) / tokens,
        sum(report.deciding_s for report in reports) / sum(report.seconds for report in reports),
        equal,
    )


def show(rows: list[ContestRow], console: Console) -> None:
    table = Table("policy", "seeds", "offline", "tokens/s", "÷ full depth", "÷ best static",
                  "÷ static, processor time", "drafts a cycle", "accepted", "layers a token",
                  "decisions", "equal")  # fmt: skip
    for row in rows:
        full = f"{row.ratio_full:.3f} ({row.ratio_full_low:.3f}-{row.ratio_full_high:.3f})"
        static = f"{row.ratio_static:.3f} ({row.ratio_static_low:.3f}-{row.ratio_static_high:.3f})"
        cpu = f"{row.cpu_ratio_static:.3f} ({row.cpu_ratio_static_low:.3f}-"
        cpu += f"{row.cpu_ratio_static_high:.3f})"
        table.add_row(
            row.policy, str(row.seeds), number(row.offline_rate, ".3f"), f"{row.tokens_per_s:.1f}",
            full, static, cpu, number(row.drafts_per_cycle, ".2f"),
            number(row.accepted, ".0%"), number(row.layers_per_token, ".1f"),
            number(row.decision_share, ".1%"), number(row.equal, ".0%"),
        )  # fmt: skip
    console.print(table)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
