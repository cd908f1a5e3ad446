"""What filling skipped layers destroys: copied entries, projected ones, through a map, and none.

Two tables. By exit, tokens leave at random or where the exit is sure, and one pass over the deeper
layers says how many of those that stay then say something else. By policy, documents are followed:
the agreement with full depth over an exact cache (``defer``: what a recording promises), and
projected plainly and through the map, in turns; how long that took against full depth, and the
share of it that was filling.

Shape suffixes: T tokens, L layers, G key/value heads, H head_dim.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.agents.tuning.kv_quality import LEAVING, FilledTokens, by_token, full_depth, said_over
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.follow import follow
from offramp.worker.model.filling.kv_map import UNMAPPED
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.spec import WorkerSpec, load_engine

SURE = 0.8
"""Probability of an exit's most likely token from which it counts as sure."""

PROMPT = 32
"""Tokens of each document that are read at full depth first."""

Row = dict[str, Any]


def engines_of(model: str, dtype: str, kv: Path, slots: int) -> dict[str, AdaptiveEngine]:
    """An engine for each way to fill, and one for full depth."""
    ways = {
        "full depth": EngineConfig(),
        "defer": EngineConfig(kv_mode="defer", translators=kv),
        "project": EngineConfig(translators=kv),
        "project, mapped": EngineConfig(translators=kv),
    }
    engines = {
        name: load_engine(WorkerSpec(model=model, dtype=dtype, threads=1, slots=slots, engine=each))
        for name, each in ways.items()
    }
    engines["project"].decoder.translators.kv_map = UNMAPPED  # its adapters stay
    return engines


@torch.inference_mode()
def by_exit(engine: AdaptiveEngine, texts: Sequence[Sequence[int]], seed: int) -> list[Row]:
    """What becomes of tokens that stay, by exit of the engine's map and by who leaves."""
    stack, kv_map = engine.stack, engine.decoder.translators.kv_map
    projector, generator = KVProjector(stack), torch.Generator().manual_seed(seed)
    wrong: dict[tuple[int, str, str], int] = {}
    stayed: dict[tuple[int, str], int] = {}
    for text in texts:
        states, rotary, said_T = full_depth(stack, text, tuple(kv_map.by_exit))
        random_T = torch.rand(len(text), generator=generator) < LEAVING
        for layer, x_TD in states.items():
            sure_T = stack.logits(x_TD).float().softmax(-1).amax(-1) > SURE
            before_TK = projector.values_before(x_TD, layer)
            entries = {
                "projected": projector.project(x_TD, layer, by_token(rotary), UNMAPPED),
                "mapped": projector.project(x_TD, layer, by_token(rotary), kv_map, before_TK),
                "copied": _copied(engine, text, layer, rotary),
            }
            for who, left_T in (("random", random_T), ("sure", sure_T)):
                left_T = left_T.clone()
                left_T[:PROMPT] = False
                stay_T = ~left_T
                stay_T[:PROMPT] = False
                key = layer, who
                stayed[key] = stayed.get(key, 0) + int(stay_T.sum())
                for way, filled in entries.items():
                    over = FilledTokens(left_T, layer, *filled)
                    found_T = said_over(stack, over, x_TD, layer, rotary)
                    missed = int((found_T != said_T)[stay_T].sum())
                    wrong[(*key, way)] = wrong.get((*key, way), 0) + missed
    return [
        {"exit": layer, "leaving": who, "stayed": n}
        | {way: wrong[layer, who, way] / max(1, n) for way in ("copied", "projected", "mapped")}
        for (layer, who), n in stayed.items()
    ]


def _copied(
    engine: AdaptiveEngine, text: Sequence[int], layer: int, rotary: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The last executed layer's own entries, for each deeper one, [T, L, G, H]."""
    stack, projector = engine.stack, KVProjector(engine.stack)
    before = torch.as_tensor(list(text), device=stack.device)[None]
    positions = torch.arange(len(text), device=stack.device)[None]
    x_TD = stack.embed(before, positions)[0]
    if layer > 1:
        x_TD = full_depth(stack, text, (layer - 1,))[0][layer - 1]
    own = projector.project(x_TD, layer - 1, by_token(rotary))
    deeper = stack.layers - layer
    keys, values = (each_TLGH[:, :1].expand(-1, deeper, -1, -1) for each_TLGH in own)
    return keys, values


def by_policy(
    engines: dict[str, AdaptiveEngine],
    texts: Sequence[list[int]],
    policies: Sequence[Path],
    repeats: int,
) -> Iterator[Row]:
    """Agreement, time and the share of filling, by policy and way to fill; all in turns."""
    for bundle in policies:
        made: Callable[[], Policy] = PolicyBundle.load(bundle).policy
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        said: dict[str, list[int]] = {}
        layers: dict[str, float] = {}
        for _ in range(repeats):
            for name, engine in engines.items():
                overhead = engine.decoder.overhead
                before = overhead.filling_s
                policy = NeverExit() if name == "full depth" else made()
                found, seconds = [], 0.0
                # As many at a time as there are rows: steps are not timed while others wait.
                for at in range(0, len(texts), engine.kv.slots):
                    some = texts[at : at + engine.kv.slots]
                    followed, took_s = follow(engine, some, PROMPT, policy)
                    found += followed
                    seconds += took_s
                runs[name].append((seconds, overhead.filling_s - before))
                said[name] = [token for each in found for token in each.emitted]
                depths = [depth for each in found for depth in each.exit_layers]
                layers[name] = sum(depths) / len(depths)
        for name, times in runs.items():
            pairs = zip(said[name], said["full depth"], strict=True)
            ratios = [s / full for (s, _), (full, _) in zip(times, runs["full depth"], strict=True)]
            yield {
                "policy": bundle.name,
                "slots": engines[name].kv.slots,
                "way": name,
                "tokens": len(said[name]),
                "agreement": statistics.mean(a == b for a, b in pairs),
                "layers": layers[name],
                "wall_ratio": statistics.median(ratios),
                "wall_ratio_low": min(ratios),
                "wall_ratio_high": max(ratios),
                "fill_share": statistics.median(fill / s for s, fill in times),
            }
