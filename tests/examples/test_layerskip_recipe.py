"""The LayerSkip recipe: its formulas at their ends, and one tiny step that changes the layers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.models import LAYERS, VOCAB, make_model

PATH = Path(__file__).parents[2] / "examples" / "layerskip_recipe.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layerskip_recipe", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks its annotations up
    spec.loader.exec_module(module)
    return module


def test_dropout_rises_from_none_to_p_max(recipe: ModuleType) -> None:
    rates = recipe.dropout_rates(8, 0.2, 0.0, from_scratch=False)
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(0.2))
    assert recipe.dropout_rates(8, 0.2, 0.0, from_scratch=True) == [0.0] * 8
    assert recipe.dropout_rates(8, 0.2, 1.0, from_scratch=True) == pytest.approx(rates)


def test_the_rotation_visits_every_exit_and_always_the_last(recipe: ModuleType) -> None:
    seen = [recipe.loss_weights(8, 0.2, "rotational", 3, step, 0.0) for step in range(3)]
    assert set().union(*seen) == set(range(1, 8))  # e(0) is 0
    assert all(7 in weights and sum(weights.values()) == pytest.approx(1) for weights in seen)
    raw_ratio = (0.2 * 6) / (7 + 0.2 * 21)  # e(3) over e(7)
    assert seen[0][3] / seen[0][7] == pytest.approx(raw_ratio)


def test_the_gradual_curriculum_starts_with_the_last_and_is_full_half_way(
    recipe: ModuleType,
) -> None:
    sizes = [len(recipe.loss_weights(8, 0.2, "gradual", 1, 0, t)) for t in (0.0, 0.1, 0.5, 1.0)]
    assert sizes == [1, 2, 7, 7]
    assert set(recipe.loss_weights(8, 0.2, "gradual", 1, 0, 0.1)) == {6, 7}


def test_without_dropout_the_states_are_the_models_own(recipe: ModuleType) -> None:
    model = make_model("llama")
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    states = recipe.SkippingModel(model).states(tokens, None)
    expected = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.allclose(states[2], expected[3], atol=1e-4)


def test_a_layer_that_is_always_dropped_changes_nothing(recipe: ModuleType) -> None:
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    rates = [0.0, 1.0, 0.0, 0.0, 0.0]
    states = recipe.SkippingModel(make_model("llama")).states(tokens, rates)
    assert torch.equal(states[1], states[0])
    assert not torch.equal(states[2], states[1])


def test_training_lowers_the_early_losses_and_goes_on_from_its_checkpoint(
    recipe: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    skipping = recipe.SkippingModel(make_model("llama").requires_grad_(True))
    stream = torch.arange(400) % 7
    settings = recipe.LayerSkipRecipe(0.02, 4, 16, 3e-3, 0.1, 0.2, "rotational", 2, False, 0)
    windows = recipe.spread(stream, 16)
    before = recipe.evaluate(skipping, windows)
    steps = recipe.train(skipping, stream, settings, tmp_path)
    assert steps > 1
    after = recipe.evaluate(skipping, windows)
    assert len(after) == LAYERS
    assert after[1][0] < before[1][0]
    kept = recipe.RecipeCheckpoint.load(tmp_path)
    fresh = recipe.SkippingModel(make_model("llama").requires_grad_(True))
    assert recipe.train(fresh, stream, settings, tmp_path, kept) == steps  # its time is spent
    assert recipe.evaluate(fresh, windows) == after
    assert recipe.train(fresh, stream, settings, tmp_path, replace(kept, spent=0.8)) > steps
