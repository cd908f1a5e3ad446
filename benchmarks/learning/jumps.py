"""Does PPO with jumps beat p̂ on the best subset of exits, once probes cost what they cost?

Both are chosen on one half of the validation documents and compared on the other, by what they are
paid: agreement with full depth − λ · cost (in units of a full-depth token's time), with a paired
bootstrap over documents. Test documents are not touched. Traces with many exits make the question
worth asking: `offramp record --exits 2,3,4,5,6,7,8,9,10,11 --out runs/many`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.agents.learning.export import Weights
from offramp.agents.learning.jump_ppo import JumpAgent, JumpConfig
from offramp.agents.learning.phat import PhatConfig, fit_state_phat, logit
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.learning.warm import WarmConfig
from offramp.agents.placing.replay import TakenExits
from offramp.agents.placing.state_replay import StateTable, SubsetGrid
from offramp.agents.recording.training_data import TrainingData, load_training_data
from offramp.agents.training.staged import StagedRun
from offramp.agents.training.train_config import TrainConfig
from offramp.envs.traces.tokens import TokenTraces

PREFERENCES = (0.03, 0.06, 0.12, 0.25, 0.5)
RESAMPLES = 2000
THRESHOLDS = tuple(logit(each) for each in np.linspace(0.05, 0.99, 33))


def main() -> None:
    """Print one JSON row per probe price, seed, preference and agent."""
    arguments = parse()
    torch.set_num_threads(1)
    data = load_training_data(arguments.traces, arguments.costs)
    seeds = range(1 if arguments.quick else arguments.seeds)
    for factor in (1.0,) if arguments.quick else arguments.probe:
        priced = replace(data, costs=data.costs.scaled("probe", factor))
        for row in compare(priced, seeds, arguments.quick, arguments.warm_steps):
            print(json.dumps({"probe_price": factor, **row}), flush=True)


def compare(
    data: TrainingData, seeds: Sequence[int], quick: bool, warm_steps: int
) -> Iterator[dict[str, Any]]:
    """Rows for every seed: warm start alone, and PPO after it, against p̂ on the best exits."""
    documents = data.validation.documents
    choose, report = (data.validation.select(documents[half::2]) for half in (0, 1))
    for seed in seeds:
        phat = fit_state_phat(data.train, PhatConfig(seed=seed, epochs=6 if quick else 12))
        grid = SubsetGrid.of(StateTable(choose, data.costs), phat, THRESHOLDS)
        steps = 400_000 if quick else 1_500_000
        for name, ppo_steps in (("warm start", 0), ("PPO jumps", steps)):
            start = time.perf_counter()
            config = configure(seed, ppo_steps, 200 if quick else warm_steps)
            agent = trained(data, config, seed)
            seconds = time.perf_counter() - start
            rows = against(data, agent, phat, grid, report)
            for row in rows:
                yield {"agent": name, "seed": seed, "train_s": round(seconds, 1), **row}


def trained(data: TrainingData, jump: JumpConfig, seed: int) -> JumpAgent:
    """An agent that went through its stages."""
    config = TrainConfig(traces="", tensorboard=False, seed=seed, jump=jump)
    with tempfile.TemporaryDirectory() as checkpoints:
        return StagedRun(config, data, Path(checkpoints)).train()


def configure(seed: int, steps: int, warm_steps: int) -> JumpConfig:
    """The settings of ``offramp train``, but for the number of steps."""
    ppo = PPOConfig(steps=steps, seed=seed, learning_rate=5e-4, entropy=0.001)
    return JumpConfig(warm=WarmConfig(steps=warm_steps), ppo=ppo)


def against(
    data: TrainingData, agent: Any, phat: Weights, grid: SubsetGrid, report: TokenTraces
) -> list[dict[str, Any]]:
    """One row per preference, on documents that chose nothing."""
    table = StateTable(report, data.costs)
    logits = table.logits(phat)
    rng = np.random.default_rng(0)
    rows = []
    for preference in PREFERENCES:
        routed = table.replay_router(agent.router(preference))
        subset, threshold = grid.best(preference)
        stopped = table.replay_subset(logits, subset, threshold)
        paid_N = [worth(each, table, preference) for each in (routed, stopped)]
        gain, low, high = paired(paid_N[0] - paid_N[1], report, rng)
        rows.append(
            {
                "lambda": preference,
                "gain": gain,
                "gain_low": low,
                "gain_high": high,
                **described("agent", routed, table),
                **described("subset", stopped, table),
                "subset": [report.header.exits[index] for index in subset],
            }
        )
    return rows


def worth(taken: TakenExits, table: StateTable, preference: float) -> NDArray[np.float64]:
    """Agreement − λ · cost of each token."""
    agreement_N = taken.quality_N(table.traces)
    return np.asarray(agreement_N - preference * taken.cost_N(table.problem.costs), np.float64)


def described(who: str, taken: TakenExits, table: StateTable) -> dict[str, float]:
    """Agreement, cost and probes per token, rounded."""
    return {
        f"{who}_agreement": round(float(taken.quality_N(table.traces).mean()), 4),
        f"{who}_cost": round(float(taken.cost_N(table.problem.costs).mean()), 4),
        f"{who}_probes": round(float(taken.probes_N.mean()), 3),
    }


def paired(
    gain_N: NDArray[np.float64], traces: TokenTraces, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Mean gain per token with its 95 % interval, documents drawn whole (Efron 1979)."""
    sums_D = np.bincount(traces.document_N, gain_N)
    tokens_D = np.bincount(traces.document_N)
    draws = rng.integers(len(sums_D), size=(RESAMPLES, len(sums_D)))
    means = sums_D[draws].sum(1) / tokens_D[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return tuple(round(float(each), 5) for each in (gain_N.mean(), low, high))  # type: ignore[return-value]  # three of them


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=Path("runs/many"))
    parser.add_argument("--costs", type=Path, default=None, help="file of `offramp profile`")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--probe", type=float, nargs="+", default=[1.0, 10.0], help="price factors")
    parser.add_argument("--warm-steps", type=int, default=WarmConfig().steps, help="before PPO")
    parser.add_argument("--quick", action="store_true", help="one seed, under four minutes")
    parser.add_argument("--json", action="store_true", help="rows as JSON (there is no other form)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
