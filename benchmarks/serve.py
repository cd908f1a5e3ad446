"""What does serving cost over the bare engine, and what becomes of clients when things go wrong?

The reference model behind ``offramp serve`` with one torch thread a worker, asked by a strict
client of its own: a stream is good only with the right number of tokens, the right finish reason
and ``[DONE]``. The bare engine decodes the same prompts in this process, in turns with the pool.

    python benchmarks/serve.py --json serve.json
    python benchmarks/serve.py --quick
    python benchmarks/serve.py --quick --only steady,overload
    python benchmarks/serve.py --only steady --model models/smollm2 --dtype bfloat16
    python benchmarks/serve.py --soak --json soak.json
    python benchmarks/serve.py --soak --minutes 10
    python benchmarks/serve.py --peers --quick
    python benchmarks/serve.py --peers --model models/smollm2 --dtype bfloat16 \\
        --draft-exit 30:int4 --drafts 7

Parts: *steady* (a token, the first token, and saturation, over the bare engine), *overload* (five
times what the pool can do; 400 requests at once), *clients* (that hang up, send too much or too
slowly), *lost* (workers, and then the pool, that are killed, frozen or told to stop under twelve
streams).
``--soak`` instead asks a pool of two workers for half an hour, while policies are swapped every
20 s, one client in ten leaves, and a worker is killed: what became of each request, and whether
memory grows.
``--peers`` asks what people run instead, each over HTTP and in turns: ``generate`` behind FastAPI,
``transformers serve``, llama.cpp's server (extra ``peers``), vLLM's where ``--vllm`` names an
environment that has it, and offramp, at full depth (the baseline of the ratios) and with drafts.
The client shares the machine with the pool; with fewer than three free cores they disturb each
other, and milliseconds say less than ratios and counts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from serving.bad_clients import disturbed, hang_ups
from serving.lost_workers import STREAMS, lost_workers
from serving.overload import crowded, overloaded
from serving.peers.peer_rounds import peers_side_by_side
from serving.peers.peer_servers import FixedDrafts, PeerModel
from serving.serve_rows import ServeRow, keep_rows, show_rows
from serving.served_process import free_port, served
from serving.soak import Soak
from serving.steady_state import settle, steady

from offramp.controller.policies.exits import parse_exit
from offramp.worker.spec import WorkerSpec, describe, freeze_heap, load_engine

PARTS = ("steady", "overload", "clients", "lost")
SLOTS, WAITING = 8, 8
REFERENCE = Path("models/reference")


def main(
    quick: Annotated[bool, typer.Option(help="Short spells, in a few minutes.")] = False,
    only: Annotated[str, typer.Option(help="Comma-separated parts.")] = ",".join(PARTS),
    soak: Annotated[bool, typer.Option(help="Half an hour of mixed load instead.")] = False,
    minutes: Annotated[float, typer.Option(help="With --soak: how long.")] = 30.0,
    peers: Annotated[bool, typer.Option(help="Other servers instead, side by side.")] = False,
    model: Annotated[Path, typer.Option(help="What steady and --peers serve.")] = REFERENCE,
    dtype: Annotated[str, typer.Option(help="Its type.")] = "float32",
    draft_exit: Annotated[str, typer.Option(help="With --peers: where drafts leave.")] = "3",
    drafts: Annotated[int, typer.Option(help="With --peers: how many; 0: none.")] = 2,
    vllm: Annotated[Path | None, typer.Option(help="Python of an environment with vLLM.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep rows here.")] = None,
) -> None:
    asked = only.split(",")
    unknown = ", ".join(sorted(set(asked) - set(PARTS)))
    if unknown:
        raise typer.BadParameter(f"{unknown}: use {', '.join(PARTS)}", param_hint="--only")
    began = datetime.now(UTC)
    rows: list[ServeRow] = []
    if soak:
        asked = []
        rows += soaked(minutes * 60)
    if peers:
        asked = []
        plan = FixedDrafts(parse_exit(draft_exit), drafts) if drafts else None
        rounds, tokens = (2, 32) if quick else (7, 64)
        rows += peers_side_by_side(PeerModel(model, dtype), plan, vllm, rounds, tokens)
    if "steady" in asked:
        rows += measured_steady(quick, model, dtype)
    if "overload" in asked or "clients" in asked:
        rows += measured_trouble(quick, asked)
    if "lost" in asked:
        rows += measured_lost()
    show_rows(rows)
    if json_file is not None:
        conditions = {
            "measured": f"{began:%Y-%m-%d}",
            "quick": quick,
            "model": str(model),
            "dtype": dtype,
            "cores": os.cpu_count(),
            "load_before_and_after": [LOAD_BEFORE, os.getloadavg()[0]],
        }
        keep_rows(json_file, rows, conditions)


LOAD_BEFORE = os.getloadavg()[0]
"""Processes that wanted a core in the minute before: others that run here blur all times."""


def measured_steady(quick: bool, model: Path, dtype: str) -> list[ServeRow]:
    """One worker against the bare engine."""
    engine = load_engine(WorkerSpec(model=str(model), dtype=dtype, slots=SLOTS, threads=1))
    freeze_heap()  # as a serving worker does
    name = "reference"  # as ``asked`` calls it, whatever it is
    with served(
        replicas=1, slots=SLOTS, model=model, dtype=dtype, served_model_name=name
    ) as server:

        async def work() -> list[ServeRow]:
            await settle(server)
            return await steady(server, engine, 3 if quick else 9, 100)

        return asyncio.run(work())


def measured_trouble(quick: bool, asked: list[str]) -> list[ServeRow]:
    """One worker with a short line, overloaded and badly treated."""
    with served(replicas=1, slots=SLOTS, max_waiting=WAITING) as server:

        async def work() -> list[ServeRow]:
            await settle(server)
            works: list[Awaitable[list[ServeRow]]] = []
            if "overload" in asked:
                works.append(overloaded(server, SLOTS + WAITING, 15 if quick else 180))
                works.append(crowded(server))
            if "clients" in asked:
                works.append(hang_ups(server, 200 if quick else 1000))
                works.append(disturbed(server, 5 if quick else 30))
            rows = []
            for each in works:
                rows += await each
                await server.idle()
            return rows

        return asyncio.run(work())


def measured_lost() -> list[ServeRow]:
    """Two workers, of which one alone has room for all streams."""
    with served(replicas=2, slots=STREAMS) as server:
        return asyncio.run(lost_workers(server))


def soaked(seconds: float) -> list[ServeRow]:
    """Two workers, for long."""
    facts = describe(load_engine(WorkerSpec(model="models/reference", threads=1)))
    redis_port = free_port()
    with (
        TemporaryDirectory() as folder,
        served(Path(folder), replicas=2, slots=SLOTS, redis_port=redis_port) as server,
    ):
        url = f"redis://127.0.0.1:{redis_port}/0"
        return asyncio.run(Soak(server, Path(folder), url, facts, seconds).run())


if __name__ == "__main__":
    typer.run(main)
