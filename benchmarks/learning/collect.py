"""On-policy collection: tokens per second by number of collectors, as Ray actors.

Each collector is one process with one torch thread; the clock runs while tasks are decoded, actors
already loaded. On a machine with fewer cores than collectors there is nothing to gain.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import ray
from stable_baselines3.common.logger import configure

from offramp.agents.learning.jump_ppo import JumpConfig, new_agent, problem_of
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.onpolicy.collector import CollectSpec
from offramp.agents.onpolicy.learner import Learner, LearnerConfig
from offramp.agents.onpolicy.onpolicy import OnPolicyConfig, make_tasks
from offramp.agents.onpolicy.pool import CollectorPool
from offramp.agents.recording.corpus import load_corpus, tokenize
from offramp.agents.recording.training_data import load_training_data
from offramp.worker.spec import WorkerSpec

LAMBDA_RANGE = (0.05, 0.5)


def main() -> None:
    """Print one JSON row per number of collectors."""
    arguments = parse()
    data = load_training_data(arguments.traces, arguments.costs)
    config = JumpConfig(ppo=PPOConfig(envs=2, batch=32, lambda_range=LAMBDA_RANGE))
    agent = new_agent(data.train, data.costs, config)
    learner = Learner(
        agent, problem_of(agent, data.costs, config), LearnerConfig(), configure(None, [])
    )
    recorded = set(data.train.documents)
    documents = [
        (document.digest, tuple(tokens))
        for document, tokens in tokenize(arguments.model, load_corpus(None, limit=320))
        if document.digest in recorded
    ]
    spec = CollectSpec(
        worker=WorkerSpec(model=arguments.model, slots=4), exits=agent.exits, schema=agent.schema
    )
    settings = OnPolicyConfig(documents=arguments.documents, together=4)
    ray.init(address="local", num_cpus=max(arguments.collectors), log_to_driver=False)
    for size in arguments.collectors:
        pool = CollectorPool(spec, data.candidates_VK, size)
        pool.start()
        pool.publish(learner.policy())
        tasks = make_tasks(documents, LAMBDA_RANGE, settings)
        pool.collect(tasks, 4 * size)  # warm
        start = time.perf_counter()
        rollouts = pool.collect(tasks, arguments.documents)
        seconds = time.perf_counter() - start
        pool.stop()
        tokens = sum(len(each.taken_T) for each in rollouts)
        row = {
            "collectors": size,
            "cores": os.cpu_count(),
            "rollouts": len(rollouts),
            "tokens_per_s": round(tokens / seconds, 1),
            "agreement": round(float(np.concatenate([r.agreed_T for r in rollouts]).mean()), 3),
        }
        print(json.dumps(row), flush=True)
    ray.shutdown()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=Path("runs/many"))
    parser.add_argument("--costs", type=Path, default=None)
    parser.add_argument("--model", default="models/reference")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--collectors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="rows as JSON (there is no other form)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
