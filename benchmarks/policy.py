"""What does one decision cost? One PPO actor, three ways to run it; and each probe in the loop.

*numpy* is the exported policy that workers run, *sb3* is Stable-Baselines3's ``predict``, *torch*
the actor's modules called directly. All decide the same rows, and their decisions must be equal on
every one of them. Backends take turns, call by call; a number is the median over calls, divided by
the rows.

    python benchmarks/policy.py --json policy.json
    python benchmarks/policy.py --probes --json probes.json

With ``--probes``, what a whole question costs: *warm* is a call right after itself; *loop* is what
the same call takes between two layers of a real decode step, whose weights have pushed everything
out of the caches. Only the latter is paid. All parts are taken in turn, and a part's time is
reported in microseconds and in layers of that model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO

from offramp.agents.learning.export import Normaliser, ppo_weights
from offramp.controller.features import CANDIDATES_V1, BoolArray, FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.research.probe_costs import probe_costs
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.profiling.samples import median_interval
from offramp.worker.spec import WorkerSpec, load_engine

EXITS = (3, 6, 9)
CANDIDATES = 64
ROWS = (1, 8, 64, 1024)
CHECKED_ROWS = 20_000
"""Rows on which all backends must decide alike."""

CALL_S = 100e-6
"""A timing covers as many calls as take this long, since a clock is not exact below."""

PREFERENCE = 0.2
LIMITS_US = {1: 25.0, 64: 1.0}
"""Most microseconds per decision in numpy, by rows (the budget of the decode loop)."""

Decide = Callable[[FloatArray], BoolArray]


class Blank(gym.Env[FloatArray, np.int64]):
    """As many columns and actions as ``offramp/TokenExit-v0`` has, and nothing to learn."""

    observation_space = gym.spaces.Box(-100.0, 100.0, (CANDIDATES_V1.width + 1,), np.float32)
    action_space = gym.spaces.Discrete(2)


def main(
    repeats: Annotated[int, typer.Option(help="Timings per backend and number of rows.")] = 4000,
    quick: Annotated[bool, typer.Option("--quick", help="400 timings: seconds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    probes: Annotated[bool, typer.Option(help="Measure probes in the loop instead.")] = False,
    model: Annotated[str, typer.Option(help="Of probes: model folder.")] = "models/reference",
    dtype: Annotated[str, typer.Option(help="Of probes: float32 or bfloat16.")] = "float32",
) -> None:
    if probes:
        measure_probes(WorkerSpec(model=model, dtype=dtype, threads=1), quick, json_file)
        return
    torch.set_num_threads(1)
    backends = build()
    rng = np.random.default_rng(1)
    features_NF = rng.normal(size=(CHECKED_ROWS, CANDIDATES_V1.width)).astype(np.float32)
    require_equal(backends, features_NF)
    found = [
        row
        for rows in ROWS
        for row in timed(backends, features_NF[:rows], 400 if quick else repeats)
    ]
    show(found)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


def measure_probes(spec: WorkerSpec, quick: bool, json_file: Path | None) -> None:
    engine = load_engine(spec)
    vocab, rng = engine.stack.vocab, np.random.default_rng(0)
    table_VK = np.stack([rng.permutation(vocab)[:CANDIDATES] for _ in range(vocab)])
    repeats = 20 if quick else 200
    costs = probe_costs(engine, table_VK.astype(np.int32), exits=EXITS, repeats=repeats)
    machine = describe_machine(engine.stack.dtype)
    heads = ("warm", "loop", "decide", "question", "build", "per token", "share", "layers")
    title = f"{machine}; K={CANDIDATES}, batch 1, exits {EXITS}"
    table = Table("schema", *heads, title=title, caption="µs; layers: one question in the loop")
    for name, cost in costs.items():
        parts = (cost.warm_s, cost.probe_s, cost.decide_s, cost.ask_s, cost.build_s, cost.token_s)
        cells = [f"{part * 1e6:.1f}" for part in parts]
        table.add_row(name, *cells, f"{cost.share:.1%}", f"{cost.layers:.3f}")
    Console().print(table)
    if json_file is not None:
        rows = {name: asdict(cost) for name, cost in costs.items()}
        settings = {"model": spec.model, "candidates": CANDIDATES, "exits": EXITS}
        found = {"machine": machine, "repeats": repeats, **settings, "rows": rows}
        json_file.write_text(json.dumps(found, indent=1))


def build() -> dict[str, Decide]:
    """One actor of the trained shape with random weights, in every backend."""
    model = PPO(
        "MlpPolicy",
        Blank(),
        seed=0,
        device="cpu",
        policy_kwargs={
            "net_arch": {"pi": [32, 32], "vf": [64, 64]},
            "activation_fn": torch.nn.Tanh,
        },
    )
    actor: Any = model.policy
    with torch.no_grad():
        actor.action_net.weight.mul_(100)  # as it begins, it hardly tells actions apart
    columns = CANDIDATES_V1.width + 1
    plain = Normaliser(np.zeros(columns, np.float32), np.ones(columns, np.float32))
    exported = MlpPolicy(EXITS, CANDIDATES_V1, ppo_weights(model, plain, PREFERENCE))
    net = torch.nn.Sequential(*actor.mlp_extractor.policy_net, actor.action_net)

    def observed(features_NF: FloatArray) -> FloatArray:
        last_N1 = np.full((len(features_NF), 1), np.log(PREFERENCE), np.float32)
        return np.concatenate([features_NF, last_N1], axis=1)

    def sb3(features_NF: FloatArray) -> BoolArray:
        return np.asarray(model.predict(observed(features_NF), deterministic=True)[0] == 1)

    @torch.inference_mode()
    def torch_modules(features_NF: FloatArray) -> BoolArray:
        out_N2 = net(torch.from_numpy(observed(features_NF)))
        return np.asarray((out_N2[:, 1] > out_N2[:, 0]).numpy())

    return {"numpy": exported.leave, "sb3": sb3, "torch": torch_modules}


def require_equal(backends: dict[str, Decide], features_NF: FloatArray) -> None:
    """Fail unless every backend decides like SB3 on every row, alone and among others."""
    expected_N = backends["sb3"](features_NF)
    share = expected_N.mean()
    assert 0.1 < share < 0.9, f"{share:.0%} leave: this would hide differences"
    for name, decide in backends.items():
        differ = int((decide(features_NF) != expected_N).sum())
        differ += sum(decide(features_NF[n : n + 1])[0] != expected_N[n] for n in range(1000))
        if differ:
            raise SystemExit(f"{name} decides otherwise than sb3 on {differ} rows")


def timed(backends: dict[str, Decide], rows_NF: FloatArray, repeats: int) -> list[dict[str, Any]]:
    """Rows of the report: a backend's median microseconds per decision, with its interval."""
    calls = {name: calls_of(decide, rows_NF) for name, decide in backends.items()}
    samples: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(repeats):
        for name, decide in backends.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                decide(rows_NF)
            samples[name].append((time.perf_counter() - start) / calls[name])
    found = []
    for name, seconds in samples.items():
        middle, low, high = (1e6 * value / len(rows_NF) for value in median_interval(seconds))
        row = {"backend": name, "rows": len(rows_NF), "us_per_decision": middle}
        found.append(row | {"us_low": low, "us_high": high})
    return found


def calls_of(decide: Decide, rows_NF: FloatArray) -> int:
    """How many calls one timing covers."""
    start = time.perf_counter()
    for _ in range(20):
        decide(rows_NF)
    return max(1, round(CALL_S / ((time.perf_counter() - start) / 20)))


def show(found: list[dict[str, Any]]) -> None:
    title = f"{describe_machine(torch.float32)}; µs per decision"
    table = Table("backend", *(f"{rows} rows" for rows in ROWS), title=title)
    for name in dict.fromkeys(row["backend"] for row in found):
        mine = [row for row in found if row["backend"] == name]
        table.add_row(name, *(f"{row['us_per_decision']:.3f}" for row in mine))
    console = Console()
    console.print(table)
    for row in found:
        limit = LIMITS_US.get(row["rows"])
        if row["backend"] == "numpy" and limit is not None:
            verdict = "within" if row["us_per_decision"] <= limit else "[red]above[/]"
            console.print(f"numpy, {row['rows']} rows: {verdict} {limit:g} µs a decision")


if __name__ == "__main__":
    typer.run(main)
