"""Do policies change under load without a failed, torn or late token? Workers, Redis, real streams.

Four worker processes decode for clients that never pause, on a real Redis, while a publisher
releases policies. Every request is afterwards decoded alone, offline, under the one release that
it says it ran under: tokens that differ are *torn*. Those of a release that tripped go to full
depth midway, as they should, and are held to one release alone.

    python benchmarks/hot_swap.py --quick --json swaps.json

A pause is taken from pairs: the longest gap between two tokens of any stream while a worker swaps,
and in as long a time half a second earlier.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from swapping.streamed import StreamedRequest
from swapping.swap_site import SwapSite
from swapping.swap_worker import WorkerNews

from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import WorkerSpec

EXITS = (9, 10, 11)
"""Exits of the fixed policies that take turns."""

SWAP_EVERY_S = 0.1
GARBAGE_LAYER = 1
FEWEST = 8
"""Requests that a part must have seen before anything is said of it."""

BEFORE_S = 0.5
"""How long before a swap its control lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long each part takes: seconds, and swaps that are timed."""

    timed_swaps: int = 100
    storm_s: float = 120.0
    outage_s: float = 6.0
    outages: int = 10


QUICK = Lengths(timed_swaps=25, storm_s=20.0, outage_s=3.0, outages=6)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, and what it should be."""

    what: str
    value: float
    unit: str
    target: str


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter parts.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Streams per worker.")] = 2,
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    out: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
) -> None:
    """Run every part and print a row for each figure."""
    lengths = QUICK if quick else Lengths()
    with tempfile.TemporaryDirectory() as folder:
        site = SwapSite(Path(folder), WorkerSpec(model=model, slots=4), workers, clients)
        with site.running():
            site.engine.prepare(learned(site, 0), None)  # compiled once per machine: up to a minute
            site.await_all(site.publish(NeverExit()), time.time())
            requests: list[StreamedRequest] = []
            found: list[Row] = []
            for part in (time_swaps, outages, storm, garbage):
                found += part(site, lengths, requests)
            ended = [each for news in site.news("stop") for each in news.requests]
        found += verdict(site, requests + ended)
    title = f"{describe_machine(torch.float32)}; {workers} workers, {clients} streams each"
    table = Table("what", "value", "unit", "target", title=title)
    for row in found:
        table.add_row(row.what, f"{row.value:.4g}", row.unit, row.target)
    Console().print(table)
    if out is not None:
        conditions = {"machine": title, "quick": quick}
        report = {"conditions": conditions, "rows": [asdict(row) for row in found]}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def time_swaps(site: SwapSite, lengths: Lengths, requests: list[StreamedRequest]) -> list[Row]:
    """Publish learned policies one by one; wait for every worker each time."""
    seconds = []
    told: list[list[WorkerNews]] = []
    for number in range(lengths.timed_swaps + 1):
        started = time.time()
        generation = site.publish(learned(site, number), CANDIDATES_V1.width)
        seconds.append(site.await_all(generation, started))
        time.sleep(2 * BEFORE_S)
        told.append(gather(site, requests))
    first, *later = [1e3 * each for each in seconds]
    pauses, steps = pauses_of(told)
    return [
        Row(
            "publish to all acknowledged, first of its kind, kernels on disk", first, "ms", "≤ 1000"
        ),
        Row("publish to all acknowledged, median", median(later), "ms", ""),
        Row("publish to all acknowledged, p99", p99(later), "ms", "≤ 250"),
        Row("longest gap while swapping less that of its control, median", pauses, "steps", "≤ 1"),
        Row("a token's step, median", 1e3 * steps, "ms", ""),
    ]


def learned(site: SwapSite, seed: int) -> MlpPolicy:
    """A small random policy with a candidate table, which never leaves: its cost is its asking."""
    rng = np.random.default_rng(seed)
    sizes = [CANDIDATES_V1.width, 16, 1]
    weights = [
        (rng.normal(size=(i, o)).astype(np.float32), np.zeros(o, np.float32))
        for i, o in pairwise(sizes)
    ]
    table_VK = rng.integers(0, site.facts.vocab, size=(site.facts.vocab, 8), dtype=np.int32)
    return MlpPolicy((4, 8), CANDIDATES_V1, weights, 1e9, table_VK)


def pauses_of(told: list[list[WorkerNews]]) -> tuple[float, float]:
    """Median pause, in steps of a token, and the step's seconds."""
    gaps: list[float] = []
    pauses = []
    for round_news in told:
        for news in round_news:
            pairs = [pair for each in news.requests for pair in pairwise(each.stamps)]
            gaps += [late - early for early, late in pairs]
            for start, end in news.swaps:
                during, control = (
                    longest(pairs, start - back, end - back) for back in (0.0, BEFORE_S)
                )
                if during and control:
                    pauses.append(during - control)
    step = median(gaps)
    return median(pauses) / step, step


def longest(pairs: list[tuple[float, float]], start: float, end: float) -> float:
    """The longest gap between two tokens of a stream that touches a time; 0 if none does."""
    return max((b - a for a, b in pairs if a < end and b > start), default=0.0)


def outages(site: SwapSite, lengths: Lengths, requests: list[StreamedRequest]) -> list[Row]:
    """Kill Redis and start it again, in turns; compare how long tokens take."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(lengths.outages):
        for is_up in (True, False):
            if not is_up:
                site.kill_redis()
            asked = asked_within(site, lengths.outage_s, requests)
            found[is_up].append((late_gap(asked), late_first(asked)))
        site.restart_redis()
        time.sleep(1.0)
    pairs = list(zip(found[True], found[False], strict=True))
    rows = []
    for place, what in enumerate(("gap between tokens", "time to first token")):
        up, gone = (1e3 * median(each[place] for each in found[key]) for key in (True, False))
        ratio = median(after[place] / before[place] for before, after in pairs)
        rows += [
            Row(f"{what}, p99, Redis there", up, "ms", ""),
            Row(f"{what}, p99, Redis gone", gone, "ms", ""),
            Row(f"{what}, p99, Redis gone against there, median of pairs", ratio, "×", "≤ 1.05"),
        ]
    return rows


def asked_within(
    site: SwapSite, seconds: float, requests: list[StreamedRequest]
) -> list[StreamedRequest]:
    """Requests that began from now on and ended within so long, or until there are some."""
    start, found = time.monotonic(), list[StreamedRequest]()
    gather(site, requests)
    while len(found) < FEWEST:
        time.sleep(seconds)
        told = gather(site, requests)
        found += [each for news in told for each in news.requests if each.asked > start]
    return found


def storm(site: SwapSite, lengths: Lengths, requests: list[StreamedRequest]) -> list[Row]:
    """Publish every 100 ms."""
    gather(site, requests)
    memory_mb = []
    start, swaps = time.monotonic(), 0
    while time.monotonic() - start < lengths.storm_s:
        site.publish(FixedExit(EXITS[swaps % len(EXITS)]))
        swaps += 1
        if swaps % 20 == 0:
            memory_mb.append([news.memory_mb for news in gather(site, requests)])
        time.sleep(max(0.0, swaps * SWAP_EVERY_S - (time.monotonic() - start)))
    taken = time.monotonic() - start
    site.await_all(site.publish(FixedExit(EXITS[0])), time.time())
    memory_mb.append([news.memory_mb for news in gather(site, requests)])
    stormed = [each for each in requests if start < each.asked < start + taken]
    settled = len(memory_mb) // 4
    growth = max(
        last / early for early, last in zip(memory_mb[settled], memory_mb[-1], strict=True)
    )
    return [
        Row("swaps in a storm", swaps, "", ""),
        Row("one swap every", 1e3 * taken / swaps, "ms", f"{1e3 * SWAP_EVERY_S:.0f}"),
        Row("time to first token, p99, in the storm", 1e3 * late_first(stormed), "ms", ""),
        Row("memory of the worker that grew most, end to first quarter", growth, "×", "≤ 1.02"),
    ]


def garbage(site: SwapSite, lengths: Lengths, requests: list[StreamedRequest]) -> list[Row]:
    """Publish a policy that talks garbage, uncertified, and wait for what happens."""
    del lengths
    overseer = site.overseer()
    site.await_all(site.publish(NeverExit()), time.time())
    gather(site, requests)
    started = time.monotonic()
    generation = site.publish(FixedExit(GARBAGE_LAYER))
    while not (story := overseer.look()):
        if time.monotonic() - started > 60:
            raise SystemExit("the garbage policy is not rolled back")
        time.sleep(0.1)
    rolled_back_s = time.monotonic() - started
    site.tripped.add(generation)
    back = site.publisher.promoted
    site.served[back] = NeverExit()
    site.await_all(back, time.time())
    Console().print(story)
    audited = max(news.audited.get(generation, 0) for news in gather(site, requests))
    return [
        Row("garbage published: rolled back after", rolled_back_s, "s", "≤ 5"),
        Row("audited tokens of the worker that audited most", audited, "", "≤ 200"),
    ]


def verdict(site: SwapSite, requests: list[StreamedRequest]) -> list[Row]:
    """How many requests failed or were torn, over all parts."""
    failed = [each for each in requests if each.error]
    return [
        Row("requests", len(requests), "", ""),
        Row("failed", len(failed), "", "0"),
        Row("torn", len(site.torn(requests)), "", "0"),
    ]


def gather(site: SwapSite, requests: list[StreamedRequest]) -> list[WorkerNews]:
    """The workers' news; their requests join the others."""
    told = site.news()
    requests += [each for news in told for each in news.requests]
    return told


def late_gap(requests: list[StreamedRequest]) -> float:
    """The 99th percentile of the seconds between two tokens of a stream."""
    return p99([b - a for each in requests for a, b in pairwise(each.stamps)])


def late_first(requests: list[StreamedRequest]) -> float:
    """The 99th percentile of the seconds from asking to the first token."""
    return p99([each.stamps[0] - each.asked for each in requests if each.stamps])


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return float(np.quantile(values, 0.99))


if __name__ == "__main__":
    typer.run(main)
