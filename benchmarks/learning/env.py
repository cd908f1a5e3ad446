"""How fast are the environments? Steps of all episodes per second, on one thread.

Each mode is played with random actions, alone (the core), as a Gymnasium vector environment and as
a Stable-Baselines3 one. Modes take turns, so that a drifting machine drifts for all. *wall* is the
median over rounds; *cpu* counts this process's own processor time, which other processes on the
machine cannot take away (they still share its caches).

    python benchmarks/learning/env.py --json env.json
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceHeader
from offramp.envs import (
    SequenceExitCore,
    SequenceExitVectorEnv,
    TokenExitCore,
    TokenExitVectorEnv,
    TokenTraces,
    TraceStore,
)
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv

Step = Callable[[NDArray[np.int64]], object]

COSTS = CostTable(
    layer_s=300e-6, head_s=600e-6, probe_s=30e-6, policy_s=15e-6, fill_s=10e-6, step_s=200e-6,
    layers=12, machine="invented: only the environment's own time is measured",
)  # fmt: skip

MODES: dict[str, tuple[bool, dict[str, Any]]] = {
    "gate": (False, {"actions": "gate"}),
    "jump": (False, {"actions": "jump"}),
    "sequence": (True, {"kv_mode": "project"}),
    "sequence-defer": (True, {"kv_mode": "defer", "pending_share": 0.2}),
}
"""By name: whether it is one of sequences, and its options."""


def main(
    store: Annotated[Path | None, typer.Option(help="Trace store; else invented tokens.")] = None,
    tokens: Annotated[int, typer.Option(help="Invented tokens.")] = 50_000,
    rounds: Annotated[int, typer.Option(help="Rounds per mode.")] = 15,
    steps: Annotated[int, typer.Option(help="Steps of each episode per round, at most.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    quick: Annotated[bool, typer.Option(help="1024 environments only, fewer rounds.")] = False,
) -> None:
    traces = TraceStore.open(store).read() if store else invented(tokens)
    rounds = min(rounds, 7) if quick else rounds
    sizes = (1024,) if quick else (1, 64, 1024)
    players = {
        (name, count): player
        for count in sizes
        for mode in MODES
        for name, player in players_of(mode, traces, count).items()
    }
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in players}
    for _ in range(rounds):
        for key, player in players.items():
            rates[key].append(play(*player, key[1], min(steps, 40_000 // key[1] + 20)))
    rows = [row_of(*key, each) for key, each in rates.items()]
    show(rows)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1))


def players_of(mode: str, traces: TokenTraces, count: int) -> dict[str, tuple[Step, int]]:
    """How to step each adapter of a mode, and how many actions it has."""
    is_sequence, options = MODES[mode]
    core_type = SequenceExitCore if is_sequence else TokenExitCore
    core = core_type(traces, COSTS, num_envs=count, **options)
    vector = (SequenceExitVectorEnv if is_sequence else TokenExitVectorEnv)(
        traces=traces, costs=COSTS, num_envs=count, **options
    )
    sb3 = CoreVecEnv(core_type(traces, COSTS, num_envs=count, **options))
    vector.reset(seed=0)
    sb3.reset()
    actions = core.actions.count
    return {
        mode: (core.step, actions),
        f"{mode}/gymnasium": (vector.step, actions),
        f"{mode}/sb3": (sb3.step, actions),
    }


def play(step: Step, actions: int, count: int, steps: int) -> tuple[float, float]:
    """Steps of all episodes per second, by the wall and by the process's own clock."""
    rng = np.random.default_rng(0)
    drawn_SB = rng.integers(actions, size=(steps, count))
    step(drawn_SB[0])
    wall, cpu = time.perf_counter(), time.process_time()
    for actions_B in drawn_SB:
        step(actions_B)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return steps * count / wall, steps * count / cpu


def row_of(mode: str, count: int, rates: list[tuple[float, float]]) -> dict[str, Any]:
    walls = sorted(wall for wall, _ in rates)
    return {
        "mode": mode,
        "n_envs": count,
        "steps_per_s": round(median(walls)),
        "steps_per_s_low": round(walls[0]),
        "steps_per_s_high": round(walls[-1]),
        "steps_per_cpu_s": round(median(cpu for _, cpu in rates)),
    }


def show(rows: list[dict[str, Any]]) -> None:
    title = f"one thread, load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    table = Table("mode", "envs", "steps/s", "slowest", "fastest", "per cpu s", title=title)
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else v for v in row.values()))
    Console().print(table)


def invented(tokens: int, exits: tuple[int, ...] = (3, 6, 9), document: int = 250) -> TokenTraces:
    """Random tokens with flags where flags belong."""
    rng = np.random.default_rng(0)
    shape = (tokens, len(exits))
    features_NEF = rng.random((*shape, CANDIDATES_V1.width), np.float32)
    features_NEF[:, :, CANDIDATES_V1.index("agrees")] = rng.integers(2, size=shape)
    documents = -(-tokens // document)
    return TokenTraces(
        header=TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=exits, layers=12),
        features_NEF=features_NEF,
        softmax_NES=rng.random((*shape, 3), np.float32),
        exit_token_NE=rng.integers(100, size=shape, dtype=np.int32),
        agree_NE=rng.integers(2, size=shape).astype(np.float32),
        gap_NE=-rng.exponential(size=shape).astype(np.float32),
        right_NE=rng.integers(2, size=shape).astype(np.float32),
        full_right_N=np.ones(tokens, np.float32),
        position_N=(np.arange(tokens) % document).astype(np.int32),
        document_N=(np.arange(tokens) // document).astype(np.int32),
        documents=tuple(f"{index:064x}" for index in range(documents)),
    )


if __name__ == "__main__":
    typer.run(main)
