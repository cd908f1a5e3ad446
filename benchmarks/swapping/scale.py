"""How a channel does with up to ten thousand workers: convergence, Redis's load, what herds do.

The workers' code is the product's own and the Redis server a real one; the clock is simulated, and
with it the network and how long the server's thread takes (`docs/scale.md`).

    PYTHONPATH=benchmarks python benchmarks/swapping/scale.py --json scale.json --plot scale.png
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import redis
import torch
import typer
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from offramp.controller.policies.kinds import MAX_BLOB_BYTES
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker.profiling.profile import describe_machine
from swapping.fleet import Fleet, FleetRow
from swapping.simulated_redis import ServerCosts

SIZES = (10, 100, 1000, 10_000)
QUICK = (10, 100)

SMALL_BYTES, LARGE_BYTES = 8_000, 1_600_000
"""A policy without a candidate table, and one with 8 candidates for each of 50,000 tokens."""

MOST_BYTES = MAX_BLOB_BYTES
"""The largest that workers take."""

TRIALS = 20_000
LONG_TRIALS = 300


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small fleets.")] = False,
    most: Annotated[int, typer.Option(help="The largest fleet.")] = SIZES[-1],
    out: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the picture.")] = None,
    costs: Annotated[
        str, typer.Option(help="Redis's thread: µs per command, ns per byte; measured if not given")
    ] = "",
) -> None:
    """Run each scene with each size of fleet, and print a row for each."""
    logging.getLogger("offramp").setLevel(logging.ERROR)  # ten thousand workers tell the same
    memory = Path("/dev/shm")
    rows: list[FleetRow] = []
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        with EmbeddedRedis(folder / "costs") as server:
            needs = parse_costs(costs) if costs else measure_costs(server.url)
        for size in QUICK if quick else SIZES:
            for row in run_scenes(folder / f"{size}", size, needs) if size <= most else ():
                Console(stderr=True).print(row)  # the largest fleets take their time
                rows.append(row)
    title = (
        f"{describe_machine(torch.float32)}; {1e6 * needs.command_s:.1f} µs of Redis's thread per "
        f"command, {1e9 * needs.byte_s:.2f} ns per byte"
    )
    show(rows, title)
    if out is not None:
        report = {"conditions": title, "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(rows, plot)


def run_scenes(folder: Path, size: int, costs: ServerCosts) -> Iterator[FleetRow]:
    """One fleet on a server of its own: quiet, publications, an outage."""
    random.seed(0)
    with EmbeddedRedis(folder / "redis") as server:
        fleet = Fleet(folder, server.url, size, costs)
        with fleet.living():
            yield fleet.quiet()
            yield fleet.publish(SMALL_BYTES)
            yield fleet.outage(SMALL_BYTES)
            # Last: a fleet that overloads the server is not quiet again at once.
            yield fleet.publish(LARGE_BYTES)
            yield fleet.publish(MOST_BYTES)


def parse_costs(text: str) -> ServerCosts:
    """Costs that were measured before, so that runs can be compared."""
    command_us, byte_ns = map(float, text.split(","))
    return ServerCosts(command_s=1e-6 * command_us, byte_s=1e-9 * byte_ns)


def measure_costs(url: str) -> ServerCosts:
    """Processor seconds of the real server: short commands one by one, then long answers."""
    client = redis.Redis.from_url(url)
    client.set("short", b"x" * 100)
    client.set("long", b"x" * LARGE_BYTES)
    before = processor_s(client)
    for _ in range(TRIALS):
        client.getrange("short", 0, 99)
    between = processor_s(client)
    for _ in range(LONG_TRIALS):
        client.getrange("long", 0, LARGE_BYTES - 1)
    after = processor_s(client)
    command_s = (between - before) / TRIALS
    return ServerCosts(
        command_s=command_s,
        byte_s=max(0.0, (after - between) / LONG_TRIALS - command_s) / LARGE_BYTES,
    )


def processor_s(client: redis.Redis) -> float:
    """Processor seconds that the server has used."""
    facts: Any = client.info("cpu")
    return float(facts["used_cpu_user"] + facts["used_cpu_sys"])


def show(rows: list[FleetRow], title: str) -> None:
    """Print the rows."""
    seconds = ("half s", "99 % s", "all s")
    load = ("commands", "peak/s", "MB", "held MB", "wait ms", "late")
    table = Table("scene", "workers", "policy kB", "reached", *seconds, *load, title=title)
    for row in rows:
        values = list(asdict(row).values())
        values[2] = row.blob_bytes / 1e3
        table.add_row(*(each if isinstance(each, str) else f"{each:,.5g}" for each in values))
    Console(width=160).print(table)


def draw(rows: list[FleetRow], path: Path) -> None:
    """Draw how long agreeing takes, and what the server gets to do, by the size of the fleet."""
    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    scenes = dict.fromkeys((row.scene, row.blob_bytes) for row in rows)
    for number, (scene, size) in enumerate(scenes):
        own = [row for row in rows if (row.scene, row.blob_bytes) == (scene, size)]
        workers = [row.workers for row in own]
        name = scene if scene == "quiet" else f"{scene}, {size / 1e6:.2g} MB"
        style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "label": name}
        right.plot(workers, [row.peak_per_s for row in own], **style)
        if scene != "quiet":
            left.plot(workers, [row.p99_s for row in own], **style)
    left.set(title="Until 99 % run the new policy", ylabel="simulated seconds")
    right.set(title="Redis's busiest tenth of a second", ylabel="commands per second")
    for axes in (left, right):
        axes.set(xlabel="workers", xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
