"""Exit translators as decoding meets them: arithmetic, files, and every refusal of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS
from offramp.controller.errors import ConfigError
from offramp.worker.model.translators import ExitTranslators, Translator

LAYERS, WIDTH, RANK = 6, 8, 3
FACTS = {"model": "f" * 64, "layers": LAYERS, "width": WIDTH}


def translator(seed: int) -> Translator:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(RANK, WIDTH), (WIDTH, RANK), (WIDTH,)]
    return Translator(*(torch.randn(*shape, generator=generator) for shape in shapes))


@pytest.fixture
def translators() -> ExitTranslators:
    return ExitTranslators({4: translator(4), 2: translator(2)})


@pytest.fixture
def folder(translators: ExitTranslators, tmp_path: Path) -> Path:
    translators.save(tmp_path, FACTS)
    return tmp_path


def load(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> ExitTranslators:
    arguments = {"fingerprint": "f" * 64, "layers": LAYERS, "width": WIDTH, **changes}
    return ExitTranslators.load(folder, dtype=dtype, device="cpu", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH), (0, WIDTH)])
def test_apply_is_the_formula(translators: ExitTranslators, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    part = translator(2)
    expected = x + (x @ part.A_rD.T) @ part.B_Dr.T + part.b_D
    assert torch.allclose(translators.apply(2, x), expected, atol=1e-5)


def test_a_layer_without_a_translator_gets_its_own_tensor_back(
    translators: ExitTranslators,
) -> None:
    x = torch.randn(2, WIDTH)
    assert translators.apply(3, x) is x
    assert ExitTranslators().apply(2, x) is x
    assert translators.exits == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_loads_as_it_was(
    translators: ExitTranslators, folder: Path, dtype: torch.dtype
) -> None:
    loaded = load(folder, dtype)
    x = torch.randn(3, WIDTH).to(dtype)
    assert loaded.exits == (2, 4)
    assert loaded.apply(4, x).dtype == dtype
    assert torch.equal(loaded.apply(4, x), translators.to(dtype, "cpu").apply(4, x))


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / DESCRIPTION).read_text())
        change(facts)
        (folder / DESCRIPTION).write_text(json.dumps(facts))

    return damage


def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Other tensors under a description that names them, so that only they are at fault."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        edit(lambda facts: facts.update(digest=digest))(folder)

    return damage


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), "no readable tune.json"),
    "description cut": (lambda folder: (folder / DESCRIPTION).write_text("{"), "no readable"),
    "description a list": (lambda folder: (folder / DESCRIPTION).write_text("[]"), "format None"),
    "other format": (edit(lambda facts: facts.update(format=2)), "format 2, not 1"),
    "other model": (edit(lambda facts: facts.update(model="e" * 64)), "was fitted to the model"),
    "no model": (edit(lambda facts: facts.pop("model")), "was fitted to the model"),
    "exits too deep": (edit(lambda facts: facts.update(exits=[2, LAYERS])), "do not ascend"),
    "exits unsorted": (edit(lambda facts: facts.update(exits=[4, 2])), "do not ascend"),
    "exits no numbers": (edit(lambda facts: facts.update(exits=["2"])), "do not ascend"),
    "exits missing": (edit(lambda facts: facts.pop("exits")), "do not ascend"),
    "an exit too many": (edit(lambda facts: facts.update(exits=[2, 3, 4])), "3.A"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no readable translators"),
    "weights cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "no readable"),
    "a bit flipped": (flip_a_byte, "is not the one"),
    "a stray tensor": (rewrite(lambda t: t.update(stray=torch.zeros(1))), "stray"),
    "a tensor gone": (rewrite(lambda t: t.pop("4.b")), "4.b"),
    "misshapen": (rewrite(lambda t: t.update({"2.B": torch.zeros(RANK, WIDTH)})), "shapes"),
    "a scalar": (rewrite(lambda t: t.update({"2.A": torch.zeros(())})), "shapes"),
    "no rank": (
        rewrite(lambda t: t.update({"2.A": torch.zeros(0, WIDTH), "2.B": torch.zeros(WIDTH, 0)})),
        "shapes",
    ),
    "not finite": (rewrite(lambda t: t["4.B"].fill_(float("nan"))), "exit 4 holds NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_field_and_remedy(folder: Path, damage: str) -> None:
    harm, problem = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert caught.value.field == "translators"
    assert problem in caught.value.problem
    assert "offramp tune" in caught.value.remedy


@pytest.mark.parametrize("changes", [{"fingerprint": "0" * 64}, {"layers": 4}, {"width": 16}])
def test_another_model_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, **changes)
    assert caught.value.field == "translators"
