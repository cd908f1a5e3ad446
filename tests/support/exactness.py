"""What the engine is compared to: Hugging Face's own decoding, and each layer's own entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from offramp.worker import AdaptiveEngine
from offramp.worker.model.filling.kv_map import UNMAPPED, KVMap


def hf_greedy(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Hugging Face's own generate, left-padded, cut at the end-of-sequence token."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + p for p in prompts]
    kept = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    ids, mask = (torch.tensor(each, device=model.device) for each in (rows, kept))
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
    emitted = out[:, longest:].tolist()
    eos = model.config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in emitted]


def assert_same(model: Any, prompts: list[list[int]], ours: Any, theirs: list[list[int]]) -> None:
    """Equal tokens; on a GPU, whose kernels change with a product's shape, equal up to a tie.

    A tie: the model's own logits of the two tokens lie within 1e-4 in float32, within 2⁻⁶ of the
    largest in bfloat16.
    """
    if model.device.type == "cpu":
        assert ours == theirs
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
        pairs = enumerate(zip(mine, other, strict=False))
        place = next((n for n, (a, b) in pairs if a != b), None)
        if place is None:
            assert len(mine) == len(other)
            continue
        ids = torch.tensor([[*prompt, *other[:place]]], device=model.device)
        logits_V = model(ids).logits[0, -1].float()
        close = 1e-4 if model.dtype is torch.float32 else 2**-6 * float(logits_V.abs().max())
        assert float(logits_V[other[place]] - logits_V[mine[place]]) <= close


def check_fill(
    engine: AdaptiveEngine,
    first_layer: int,
    kv_map: KVMap = UNMAPPED,
    moved: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, x_ND: x_ND,
) -> None:
    """Fused fill, and what it writes, ≈ each skipped layer's own projections of the exit state.

    ``moved`` gives the state that the layers from the first on read, through the map.
    """
    device = engine.stack.device
    x_ND = torch.randn(3, engine.stack.width).to(device)
    rotary = engine.stack.rotary(x_ND[:, None], torch.tensor([[4], [0], [9]], device=device))
    assert engine.decoder.projector is not None
    projector, kv = engine.decoder.projector, engine.kv
    keys, values = projector.project(x_ND, first_layer, rotary, kv_map)
    kv.reserve(10)
    projector.fill(x_ND, first_layer, np.array([[2, 0, 1], [4, 0, 9]]), kv, kv_map)

    class Spy:
        def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
            spied[layer] = (k, v)
            return k, v

    spied: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index in range(first_layer, engine.stack.layers):
        read_ND = moved(index - first_layer, x_ND)
        engine.stack.run_layer(index, read_ND[:, None], rotary, None, Spy())
        for n, (slot, position) in enumerate([(2, 4), (0, 0), (1, 9)]):
            kept = (part[index, slot, :, position] for part in (kv.keys_LSGCH, kv.values_LSGCH))
            torch.testing.assert_close(
                (*kept,), (spied[index][0][n, :, 0], spied[index][1][n, :, 0])
            )
        torch.testing.assert_close(keys[:, index - first_layer], spied[index][0][:, :, 0])
        torch.testing.assert_close(values[:, index - first_layer], spied[index][1][:, :, 0])
