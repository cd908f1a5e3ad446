"""The loss and its gradient, the identity at the start, and that the backbone is not touched."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, smooth_l1_loss

from offramp.agents.tuning import exit_losses
from offramp.agents.tuning.distil import (
    TrainableTranslator,
    backward,
    freeze,
    fresh_translators,
    states_at,
)
from offramp.agents.tuning.exit_losses import FEATURES, exit_loss, kl_of_logits, loss_head
from offramp.agents.tuning.quality import measure, summarise
from offramp.agents.tuning.tune import rate_share
from offramp.worker.model.families import HFStack, stack_for
from offramp.worker.model.translators import ExitTranslators
from support.models import LAYERS, VOCAB, make_model

EXITS = (1, 3)
TOKENS = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))


def stack_of(dtype: torch.dtype = torch.float32, family: str = "llama") -> HFStack:
    return stack_for(make_model(family, dtype))


def trained(stack: HFStack, steps: int = 30) -> dict[int, TrainableTranslator]:
    modules = fresh_translators(stack, EXITS, 4, TOKENS, seed=0)
    parameters = [each for module in modules.values() for each in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(stack, modules, TOKENS)
        optimizer.step()
    return modules


class DoubleHead:
    """A norm and head in float64: Hugging Face's norms compute in float32, whatever they get."""

    dtype = torch.float64

    def __init__(self, width: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.weight_VD = torch.randn(vocab, width, generator=generator).double()

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND * x_ND.square().mean(-1, keepdim=True).rsqrt() @ self.weight_VD.T


def test_the_loss_has_the_gradient_that_finite_differences_find() -> None:
    width, vocab = 6, 9
    generator = torch.Generator().manual_seed(1)
    head: Any = DoubleHead(width, vocab)
    module = TrainableTranslator(width, 2, 3.0, generator).double()
    with torch.no_grad():  # away from the start, where the gradient of A is 0
        module.B.normal_(generator=generator)
        module.b.normal_(generator=generator)
    x_ND, last_ND = torch.randn(2, 4, width, generator=generator).double()

    def loss(*leaves: Tensor) -> Tensor:
        *values, x_ND = leaves
        parts = {**dict(zip("ABb", values, strict=True)), "scale": module.scale}
        translated_ND = torch.func.functional_call(module, parts, (x_ND,))
        return exit_loss(head, torch.nn.Identity(), translated_ND, head.logits(last_ND))

    inputs = (module.A, module.B, module.b, x_ND)
    leaves = tuple(each.detach().clone().requires_grad_() for each in inputs)
    assert torch.autograd.gradcheck(loss, leaves)


def test_the_kl_is_torchs_kl_div() -> None:
    final_NV, exit_NV = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    expected_N = kl_div(
        exit_NV.log_softmax(-1), final_NV.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(kl_of_logits(final_NV, exit_NV), expected_N)
    assert torch.allclose(kl_of_logits(final_NV, final_NV + 3), torch.zeros(5).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_translator_is_the_identity(dtype: torch.dtype) -> None:
    stack = stack_of(dtype)
    modules = fresh_translators(stack, EXITS, 4, TOKENS, seed=0)
    states, _ = states_at(stack, TOKENS, EXITS)
    served = freeze(modules).to(dtype, "cpu")
    for layer in EXITS:
        assert torch.equal(served.apply(layer, states[layer]), states[layer])
        assert torch.equal(modules[layer](states[layer]).to(dtype), states[layer])


def test_the_frozen_form_says_what_the_trained_one_says() -> None:
    stack = stack_of()
    modules = trained(stack)
    states, _ = states_at(stack, TOKENS, EXITS)
    served = freeze(modules)
    for layer in EXITS:
        found = served.apply(layer, states[layer])
        assert torch.allclose(found, modules[layer](states[layer]), atol=1e-5)
        assert not torch.allclose(found, states[layer], atol=1e-2)
        assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_depth_and_the_backbone_stay_bit_for_bit(dtype: torch.dtype) -> None:
    stack = stack_of(dtype)
    weights = {name: each.clone() for name, each in stack.model.state_dict().items()}
    before = stack.logits(states_at(stack, TOKENS, ())[1])
    modules = trained(stack)
    served = freeze(modules).to(dtype, "cpu")
    states, last_ND = states_at(stack, TOKENS, EXITS)
    copies = {layer: state.clone() for layer, state in states.items()}
    for layer in EXITS:
        served.apply(layer, states[layer])
        assert torch.equal(states[layer], copies[layer]), "deeper layers would see the translator"
    assert torch.equal(stack.logits(served.apply(LAYERS, last_ND)), before)
    assert all(each.grad is None for each in stack.model.parameters())
    after = stack.model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in weights.items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_states_are_those_of_hugging_face(family: str) -> None:
    stack = stack_of(family=family)
    states, last_ND = states_at(stack, TOKENS, EXITS)
    output = stack.model(TOKENS, output_hidden_states=True, use_cache=False)
    for layer in EXITS:
        expected = output.hidden_states[layer].flatten(0, 1)
        assert torch.allclose(states[layer], expected, atol=1e-4)
    assert torch.allclose(stack.logits(last_ND), output.logits.flatten(0, 1), atol=1e-3)


def test_distillation_lowers_the_kl_of_what_it_trains_on() -> None:
    stack = stack_of()
    first = backward(stack, fresh_translators(stack, EXITS, 4, TOKENS, seed=0), TOKENS)
    last = backward(stack, trained(stack), TOKENS)
    assert all(last[layer] < 0.5 * first[layer] for layer in EXITS)


def test_blocks_of_the_head_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of()
    whole, parts = (fresh_translators(stack, EXITS, 4, TOKENS, seed=0) for _ in range(2))
    losses = backward(stack, whole, TOKENS)
    monkeypatch.setattr(exit_losses, "BLOCK_VALUES", 7 * VOCAB)
    assert backward(stack, parts, TOKENS) == pytest.approx(losses, rel=1e-5)
    for layer in EXITS:
        for one, other in zip(whole[layer].parameters(), parts[layer].parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_a_loss_over_frequent_tokens_is_the_kl_among_them() -> None:
    stack = stack_of()
    texts = [[5, 5, 5, 9, 9, 2], [9, 2, 5, 7]]
    counts = Counter(token for text in texts for token in text)
    assert loss_head(stack, counts, 0) is stack
    head = loss_head(stack, counts, 3)
    modules = fresh_translators(stack, EXITS, 4, TOKENS, seed=0)
    losses = backward(stack, modules, TOKENS, head)
    states, last_ND = states_at(stack, TOKENS, EXITS)
    frequent = [5, 9, 2]
    for layer in EXITS:
        final_N3, exit_N3 = (stack.logits(x)[:, frequent] for x in (last_ND, states[layer]))
        expected = kl_of_logits(final_N3, exit_N3).mean().item()
        assert losses[layer] == pytest.approx(expected, rel=1e-4)


def test_the_loss_by_features_is_the_distance_of_normed_states_and_a_tenth_of_the_kl() -> None:
    stack = stack_of()
    modules, twins = (fresh_translators(stack, EXITS, 4, TOKENS, seed=0) for _ in range(2))
    losses = backward(stack, modules, TOKENS, by=FEATURES)
    states, last_ND = states_at(stack, TOKENS, EXITS)
    for layer in EXITS:
        read_ND = twins[layer](states[layer])
        kl = kl_of_logits(stack.logits(last_ND), stack.logits(read_ND)).mean()
        assert losses[layer] == pytest.approx(kl.item(), rel=1e-4)
        distance = smooth_l1_loss(stack.norm(read_ND), stack.norm(last_ND).detach())
        (distance + 0.1 * kl).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        own, twin = modules[layer].b.grad, twins[layer].b.grad
        assert own is not None
        assert twin is not None
        assert twin.abs().max() > 0
        assert torch.allclose(own, twin, atol=1e-6)


def test_measured_quality_is_what_whole_logits_say() -> None:
    stack = stack_of()
    tokens = TOKENS[0].tolist()
    rows = summarise(measure(stack, ExitTranslators(), [tokens], EXITS), len(tokens) - 1)
    output = stack.model(TOKENS[:1, :-1], output_hidden_states=True, use_cache=False)
    full_TV, labels_T = output.logits[0], TOKENS[0, 1:]
    exit_TV = stack.logits(output.hidden_states[1][0])
    assert [row.layer for row in rows] == [*EXITS, LAYERS]
    expected = (exit_TV.argmax(-1) == full_TV.argmax(-1)).float().mean().item()
    assert rows[0].agreement == pytest.approx(expected)
    nll = torch.nn.functional.cross_entropy(exit_TV, labels_T).item()
    assert rows[0].nll == pytest.approx(nll, rel=1e-4)
    assert rows[0].kl == pytest.approx(kl_of_logits(full_TV, exit_TV).mean().item(), rel=1e-3)
    assert (rows[-1].agreement, rows[-1].kl) == (1.0, 0.0)


def test_the_learning_rate_rises_then_falls_to_almost_nothing() -> None:
    shares = [rate_share(step, 100) for step in range(100)]
    assert max(shares) == shares[4] == 1.0
    assert shares[0] == pytest.approx(0.2)
    assert shares[-1] < 0.01
    assert all(math.isfinite(rate_share(step, 1)) for step in (0, 1))
