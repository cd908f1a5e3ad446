"""Measure what one token's parts cost on this machine.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from offramp.controller.costs import CostTable
from offramp.controller.features import CANDIDATES_V1, IntArray
from offramp.worker.attention import decode_window
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.fill import KVProjector
from offramp.worker.probes import CandidateProbe
from offramp.worker.profile_probes import prefilled_row, random_policy
from offramp.worker.schedule import Launch


@torch.inference_mode()
def measure_costs(
    engine: AdaptiveEngine, candidates_VK: IntArray, *, context: int = 128, repeats: int = 31
) -> CostTable:
    """Median seconds of each part of a decode step at batch 1.

    Args:
        engine: An idle engine; its model, dtype and thread count are what is measured.
        candidates_VK: The candidate table whose probe is timed.
        context: Tokens already in the cache.
        repeats: Timings per part; the median counts.
    """
    stack = engine.stack
    prompt = tuple(index % stack.vocab for index in range(context))
    row = prefilled_row(engine, prompt)
    position = torch.tensor([[context]], device=stack.device)
    x_11D = stack.embed(torch.tensor([[prompt[0]]], device=stack.device), position)
    rotary = stack.rotary(x_11D, position)
    window = decode_window([0], [context], stack.heads_per_key, x_11D)
    engine.kv.open(window)
    projector = KVProjector(stack)
    state_ND = x_11D[:, 0]
    slot_N = torch.zeros(1, dtype=torch.long, device=stack.device)

    def run_layers() -> None:
        x = x_11D
        for index in range(stack.layers):
            x = stack.run_layer(index, x, rotary, window, engine.kv)

    def fill() -> None:
        engine.kv.fill(0, slot_N, position[0], *projector.project(state_ND, 0, rotary))

    probe = _probe(engine, candidates_VK, state_ND, context)
    policy = random_policy(CANDIDATES_V1, (1,), candidates_VK)
    features_NF = probe.features(1, state_ND)
    seconds = _interleaved(
        {
            "layers": run_layers,
            "head": lambda: stack.logits(state_ND).argmax().item(),
            "whole": lambda: engine.decoder.launch([(Launch(0, stack.layers, (row,)), ())]),
            "probe": lambda: probe.features(1, state_ND),
            "policy": lambda: policy.leave(features_NF),
            "fill": fill,
        },
        repeats,
    )
    return CostTable(
        layer_s=seconds["layers"] / stack.layers,
        head_s=seconds["head"],
        probe_s=seconds["probe"],
        policy_s=seconds["policy"],
        fill_s=seconds["fill"] / stack.layers,
        step_s=max(0.0, seconds["whole"] - seconds["layers"] - seconds["head"]),
        layers=stack.layers,
        machine=describe_machine(stack.dtype),
        model=engine.model_fingerprint,
    )


def describe_machine(dtype: torch.dtype) -> str:
    """Processor, operating system, dtype and threads, on one line."""
    name = str(dtype).removeprefix("torch.")
    return f"{_processor()}, {platform.system()}, {name}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _interleaved(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds per action, taken in turn so that a drifting machine drifts for all."""
    timings: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            timings[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in timings.items()}


def _probe(
    engine: AdaptiveEngine, candidates_VK: IntArray, state_ND: torch.Tensor, context: int
) -> CandidateProbe:
    position_N = np.asarray([context], np.int32)
    return CandidateProbe(engine.stack, candidates_VK[:1], state_ND, position_N, exits=3)
