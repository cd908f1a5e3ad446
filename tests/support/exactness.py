"""What the engine is compared to: Hugging Face's own decoding, and each layer's own entries."""

from __future__ import annotations

from typing import Any

import torch

from offramp.worker import AdaptiveEngine


def hf_greedy(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Hugging Face's own generate, left-padded, cut at the end-of-sequence token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
    rows = out[:, longest:].tolist()
    eos = model.config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def check_fill(engine: AdaptiveEngine, first_layer: int) -> None:
    """Fused fill ≈ running each skipped layer's own projections on the exit state."""
    x_ND = torch.randn(3, engine.stack.width)
    rotary = engine.stack.rotary(x_ND[:, None], torch.tensor([[4], [0], [9]]))
    assert engine.decoder.projector is not None
    keys, values = engine.decoder.projector.project(x_ND, first_layer, rotary)

    class Spy:
        def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
            spied[layer] = (k, v)
            return k, v

    spied: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index in range(first_layer, engine.stack.layers):
        engine.stack.run_layer(index, x_ND[:, None], rotary, None, Spy())
        torch.testing.assert_close(keys[:, index - first_layer], spied[index][0][:, :, 0])
        torch.testing.assert_close(values[:, index - first_layer], spied[index][1][:, :, 0])
