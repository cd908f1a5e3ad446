"""How long do texts wait that come at random: under full depth, and under a policy?

Texts come one by one at the times of a Poisson process, whether or not the ones before are done
(an open loop), to the batches of ``TextService``, which classifies in this process: no HTTP, no
Ray. The rates are shares of what full depth can do, measured before each spell. Full depth and the
policy get the same texts at the same times, seed by seed, in turns; a text's latency counts from
the time it was to come.

    offramp tune --task classify --model MODEL --data train.csv --out heads
    offramp train --for classify --model MODEL --heads heads --data train.csv --out policies
    python benchmarks/serving/class_arrivals.py --model MODEL --heads heads \\
        --policy policies/chosen --data test.csv --json arrivals.json
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from offramp.agents.classifying.labelled_texts import encoded, read_labelled
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.text_service import TextService
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.model.loading import parse_dtype

MOST_WAITING = 100_000
"""Nothing is refused: what waits too long is to be seen."""

AT_ONCE = 10
"""Batches that full depth's capacity is measured on, before each spell: machines drift."""

Sequences = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Arrived:
    """What came of the texts of one spell.

    Attributes:
        latency_s: From when each text was to come until its class was there, seconds.
        seconds: From the first arrival until all were done.
        layers: Mean layers that a text ran.
    """

    latency_s: NDArray[np.float64]
    seconds: float
    layers: float

    def percentile_ms(self, share: float) -> float:
        return float(np.percentile(self.latency_s, share)) * 1e3


@dataclass(frozen=True)
class ArrivalRow:
    """Both at one rate; ratios are policy over full depth: the median seed, and all seeds' range.

    Attributes:
        load: Rate as a share of what full depth can do.
        rate: Texts per second, the median spell's.
        texts: Texts of all seeds.
        throughput_ratio: Texts done per second, policy over full depth.
        layers: Mean layers under the policy.
    """

    load: float
    rate: float
    texts: int
    seeds: int
    throughput_ratio: float
    layers: float
    full_p50_ms: float
    policy_p50_ms: float
    p50_ratio: float
    p50_range: tuple[float, float]
    full_p99_ms: float
    policy_p99_ms: float
    p99_ratio: float
    p99_range: tuple[float, float]


def arrivals(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """The times of a Poisson process, in seconds from its beginning."""
    gaps_s = np.random.default_rng(seed).exponential(1 / rate, round(rate * seconds))
    return np.cumsum(gaps_s)


async def spell(service: TextService, sequences: Sequences, at_s: NDArray[np.float64]) -> Arrived:
    """Send each text at its time, and wait for all."""
    layers, latency_s = [0] * len(at_s), np.zeros(len(at_s))
    began_s = time.perf_counter()

    async def ask(number: int) -> None:
        found = await service.classify([sequences[number % len(sequences)]])
        latency_s[number] = time.perf_counter() - began_s - at_s[number]
        layers[number] = found[0].layers

    tasks = []
    for number, due_s in enumerate(at_s.tolist()):
        wait_s = began_s + due_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.ensure_future(ask(number)))
    await asyncio.gather(*tasks)
    return Arrived(latency_s, time.perf_counter() - began_s, float(np.mean(layers)))


def under(
    classifier: Classifier,
    policy: Policy,
    rows: int,
    sequences: Sequences,
    at_s: NDArray[np.float64],
) -> Arrived:
    """One spell under a policy, with a service of its own."""
    snapshot = PolicySnapshot(1, "", policy)
    service = TextService(classifier, lambda: snapshot, rows=rows, max_waiting=MOST_WAITING)
    service.start()
    try:
        return asyncio.run(spell(service, sequences, at_s))
    finally:
        service.stop()


def able(classifier: Classifier, rows: int, sequences: Sequences) -> float:
    """Texts per second that full depth does of texts that are all there."""
    at_once_s = np.zeros(AT_ONCE * rows)
    return len(at_once_s) / under(classifier, NeverExit(), rows, sequences, at_once_s).seconds


def row_of(load: float, rate: float, pairs: Sequence[tuple[Arrived, Arrived]]) -> ArrivalRow:
    """Sum up the spells of one rate: (full depth, policy) of each seed."""

    def medians(share: float) -> tuple[float, float, float, tuple[float, float]]:
        full, policy = (
            np.array([each[side].percentile_ms(share) for each in pairs]) for side in (0, 1)
        )
        ratios = policy / full
        both = float(np.median(full)), float(np.median(policy))
        return *both, float(np.median(ratios)), (float(ratios.min()), float(ratios.max()))

    return ArrivalRow(
        load,
        rate,
        sum(len(full.latency_s) for full, _ in pairs),
        len(pairs),
        float(np.median([full.seconds / policy.seconds for full, policy in pairs])),
        float(np.mean([policy.layers for _, policy in pairs])),
        *medians(50),
        *medians(99),
    )


def show(rows: Sequence[ArrivalRow], console: Console) -> None:
    """Print a line per rate."""
    table = Table("load", "texts/s", "p50 ms", "ratio", "p99 ms", "ratio", "layers", "throughput")
    for row in rows:
        table.add_row(
            f"{row.load:.2f}",
            f"{row.rate:.0f}",
            f"{row.full_p50_ms:.1f} → {row.policy_p50_ms:.1f}",
            f"{row.p50_ratio:.2f} [{row.p50_range[0]:.2f}, {row.p50_range[1]:.2f}]",
            f"{row.full_p99_ms:.1f} → {row.policy_p99_ms:.1f}",
            f"{row.p99_ratio:.2f} [{row.p99_range[0]:.2f}, {row.p99_range[1]:.2f}]",
            f"{row.layers:.2f}",
            f"{row.throughput_ratio:.3f}",
        )
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="Encoder or causal LM, in Hugging Face format.")],
    heads: Annotated[Path, typer.Option(help="What `offramp tune --task classify` wrote.")],
    policy: Annotated[Path, typer.Option(help="A bundle, such as POLICIES/chosen.")],
    data: Annotated[Path, typer.Option(help="Texts that come, .csv or .jsonl.")],
    loads: Annotated[str, typer.Option(help="Shares of full depth's capacity.")] = "0.5,0.7,0.9",
    rows: Annotated[int, typer.Option(help="Texts of a batch at most.")] = 16,
    seeds: Annotated[int, typer.Option(help="Spells of each at each rate.")] = 8,
    seconds: Annotated[float, typer.Option(help="How long texts come in a spell.")] = 5.0,
    dtype: str = "float32",
    json_path: Annotated[Path | None, typer.Option("--json", help="Rows.")] = None,
) -> None:
    """Measure and print; write rows."""
    torch.set_num_threads(1)
    console = Console(width=110, highlight=False)
    loaded = SequenceModel.load(model, parse_dtype(dtype))
    classifier = loaded.classifier(heads)
    sequences = encoded(loaded, read_labelled(data))
    sides = (NeverExit(), PolicyBundle.load(policy).policy())
    under(classifier, sides[1], rows, sequences, np.zeros(rows))  # warms up
    able(classifier, rows, sequences)
    found = []
    for load in map(float, loads.split(",")):
        pairs, rates = [], []
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(sequences)).tolist()
            texts = [sequences[place] for place in order]
            rates.append(load * able(classifier, rows, texts))
            at_s = arrivals(rates[-1], seconds, seed)
            turns = [0, 1] if seed % 2 else [1, 0]
            spells = {turn: under(classifier, sides[turn], rows, texts, at_s) for turn in turns}
            pairs.append((spells[0], spells[1]))
        found.append(row_of(load, float(np.median(rates)), pairs))
        show(found[-1:], console)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
