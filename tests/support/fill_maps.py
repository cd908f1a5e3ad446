"""Maps of the fill for little models, in folders and engines that use them.

Shape suffixes: L layers filled, N tokens, D width, K values of one layer, r rank; I = D + K.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.model.families import stack_for
from offramp.worker.model.filling.kv_map import ExitMap, KVMap
from offramp.worker.model.translators import FILL, save_exits
from support.models import LAYERS, make_model
from support.rows import ReplayedExits

PROMPTS = [[5, 17, 33, 2, 41], [9, 8, 7], [61, 3, 3, 12, 80, 4, 44, 23]]
SAMPLING = SamplingParams(max_tokens=30, ignore_eos=True)
EXIT = 2
WIDTH = 48
KEPT = 24
"""Values that a layer of the little Llama keeps of a token."""


def reflections(seed: int = 0, first: int = EXIT) -> ExitMap:
    """Mirror each layer's input in a plane of its own: no norm can tell that from another state."""
    normals_LD = torch.randn(LAYERS - first, WIDTH, generator=torch.Generator().manual_seed(seed))
    normals_LD -= normals_LD.mean(-1, keepdim=True)
    normals_LD /= normals_LD.norm(dim=-1, keepdim=True)
    B_LDr = torch.diag_embed(torch.ones(LAYERS - first))[:, None] * normals_LD[:, :, None]
    return ExitMap(-2 * normals_LD, B_LDr, torch.zeros(LAYERS - first, WIDTH))


def moved(exit_map: ExitMap, place: int, x_ND: Tensor) -> Tensor:
    return x_ND + x_ND @ exit_map.A_rI.T @ exit_map.B_LDr[place].T + exit_map.b_LD[place]


def reading_before(family: str, **config: Any) -> ExitMap:
    """A map of rank 3 that reads the token before, too."""
    stack, generator = stack_for(make_model(family, **config)), torch.Generator().manual_seed(5)
    inputs = stack.width + stack.kv_heads * stack.head_dim
    A_rI = 0.2 * torch.randn(3, inputs, generator=generator)
    B_LDr = torch.randn(LAYERS - EXIT, stack.width, 3, generator=generator)
    b_LD = torch.randn(LAYERS - EXIT, stack.width, generator=generator)
    B_LDr[0], b_LD[0] = 0, 0
    return ExitMap(A_rI, B_LDr, b_LD)


def save_map(folder: Path, family: str, exit_map: ExitMap | None = None) -> Path:
    """A folder as ``offramp tune --kv`` writes it, for ``make_model(family)``."""
    facts = {"kind": FILL, "exits": [EXIT]}
    facts["model"] = AdaptiveEngine(make_model(family)).model_fingerprint
    save_exits(folder, KVMap({EXIT: exit_map or reflections()}).tensors(), facts)
    return folder


def engine_of(family: str, folder: Path | None = None, **config: Any) -> AdaptiveEngine:
    settings = EngineConfig(translators=folder, **config)
    return AdaptiveEngine(make_model(family), slots=3, config=settings)


def leaving() -> ReplayedExits:
    depths = [LAYERS, *[EXIT, LAYERS, EXIT] * 10]
    return ReplayedExits(depths, (EXIT,), asked=iter((EXIT,)))
