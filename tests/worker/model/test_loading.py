"""Which folders are served, what the others are told, and what a fingerprint tells apart."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from offramp.controller.errors import ConfigError, ModelError
from offramp.worker import AdaptiveEngine
from offramp.worker.model.loading import (
    check_model,
    layers_and_vocab,
    load_model,
    load_tokenizer,
    model_fingerprint,
    parse_dtype,
    require_device,
    tokenizer_fingerprint,
)
from support.models import make_model

REFERENCE = Path(__file__).parents[3] / "models" / "reference"
WEIGHTS = "model.safetensors"
MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """A model folder: the reference model's config with changes, and no weights."""

    def make(**changes: Any) -> Path:
        config = json.loads((REFERENCE / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as refused:
        call()
    assert refused.value.field == "model"
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_reference_model_is_accepted() -> None:
    check_model(REFERENCE)
    assert layers_and_vocab(REFERENCE) == (12, 4096)


@pytest.mark.parametrize("path", ["no/such/folder", "/no/such/folder", "nothing", "models/other"])
def test_a_missing_folder_is_named_without_asking_the_hub(path: str) -> None:
    assert f"there is no folder '{path}'" in refusal(lambda: check_model(path))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class MuteHub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), MuteHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port}/{{repo_id}}/{{filename}}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        message = refusal(lambda: check_model("no/such"))
        hub.shutdown()
    assert asked == ["/no/such/config.json"]
    assert "no model that the hub client can find (Server error '503" in message


def test_a_file_is_no_folder() -> None:
    assert "there is no folder" in refusal(lambda: check_model(REFERENCE / "config.json"))


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(lambda: check_model(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", "{}", '{"model_type": "nonsense"}'])
def test_an_unreadable_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    message = refusal(lambda: check_model(tmp_path))
    assert str(tmp_path) in message
    assert "unusable config.json" in message


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": "x"}, {"hidden_size": -5}, {"num_attention_heads": 7}]
)
def test_an_impossible_shape_is_named(make_folder: MakeFolder, change: dict[str, Any]) -> None:
    message = refusal(lambda: check_model(make_folder(**change)))
    assert "unusable config.json" in message


@pytest.mark.parametrize("architectures", [["BertModel"], [], None])
def test_what_is_no_causal_lm_is_refused(make_folder: MakeFolder, architectures: Any) -> None:
    message = refusal(lambda: check_model(make_folder(architectures=architectures)))
    assert "is not a causal LM" in message
    assert "BertModel" in message or not architectures


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is not a causal LM (architectures: BertModel)" in refusal(lambda: check_model(tmp_path))


def test_an_unsupported_architecture_is_named_with_those_supported(tmp_path: Path) -> None:
    config = {"model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: check_model(tmp_path))
    assert "is a BloomForCausalLM, which is not supported" in message
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_numbers_that_compiled_code_would_misread_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=f"weights of {dtype}.*Load it with dtype="):
        AdaptiveEngine(make_model("llama", dtype))


def test_an_unsupported_model_object_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    assert "BloomForCausalLM" in refusal(lambda: AdaptiveEngine(model))


def mistral(window: int | None) -> MistralConfig:
    return MistralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=window,
        architectures=["MistralForCausalLM"],
    )


def test_a_sliding_window_is_refused_as_folder_and_as_object(tmp_path: Path) -> None:
    config = mistral(window=16)
    config.save_pretrained(tmp_path)
    message = refusal(lambda: check_model(tmp_path))
    assert "sliding-window attention over 16 tokens" in message
    assert message == refusal(lambda: AdaptiveEngine(MistralForCausalLM(config).eval()))


@pytest.mark.parametrize("window", [None, 64])
def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path, window: int | None) -> None:
    config = mistral(window)
    config.save_pretrained(tmp_path)
    check_model(tmp_path)
    AdaptiveEngine(MistralForCausalLM(config).eval())


def test_angles_that_depend_on_the_length_are_refused(make_folder: MakeFolder) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    message = refusal(lambda: check_model(make_folder(rope_parameters=rope)))
    assert "'dynamic' rotary embeddings" in message


def load(folder: Path) -> Any:
    return load_model(folder, torch.float32, "cpu")


def test_a_folder_without_weights_cannot_be_loaded(make_folder: MakeFolder) -> None:
    assert "cannot be loaded" in refusal(lambda: load(make_folder()))


@pytest.mark.parametrize("kept_bytes", [0, 7, 1000, 1_000_000])
def test_weights_cut_short_are_refused_before_they_are_loaded(
    make_folder: MakeFolder, kept_bytes: int
) -> None:
    folder = make_folder()
    (folder / WEIGHTS).write_bytes((REFERENCE / WEIGHTS).read_bytes()[:kept_bytes])
    assert "model.safetensors" in refusal(lambda: check_model(folder))
    assert "is damaged" in refusal(lambda: load(folder))


def test_garbage_in_place_of_weights_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / WEIGHTS).write_bytes(b"garbage" * 100)
    assert "is damaged" in refusal(lambda: load(folder))


def test_a_missing_tensor_is_not_made_up(make_folder: MakeFolder) -> None:
    folder = make_folder()
    tensors = load_file(REFERENCE / WEIGHTS)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    message = refusal(lambda: load(folder))
    assert "lacks 1 of the weights" in message
    assert "model.layers.3.mlp.up_proj.weight" in message


def test_tensors_of_another_shape_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder(intermediate_size=700)
    shutil.copy(REFERENCE / WEIGHTS, folder)
    assert "mlp.down_proj.weight" in refusal(lambda: load(folder))


@pytest.mark.parametrize("content", [None, "{", "{}", '{"version": "1.0", "model": 3}'])
def test_a_missing_or_broken_tokenizer_is_named(
    make_folder: MakeFolder, content: str | None
) -> None:
    folder = make_folder()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    message = refusal(lambda: load_tokenizer(folder))
    assert "has no readable tokenizer" in message


@pytest.mark.parametrize("device", ["", "tpu", "cuda:x", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_model(REFERENCE, torch.float32, device)
    assert refused.value.field == "device"
    require_device("cpu")


def test_dtypes_go_by_two_names() -> None:
    assert parse_dtype("float32") is torch.float32
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype: 'float16' is unknown"):
        parse_dtype("float16")


def test_a_fingerprint_is_of_the_checkpoint_and_not_of_its_dtype(reference: AdaptiveEngine) -> None:
    half = load_model(REFERENCE, torch.bfloat16, "cpu")
    assert half.dtype is torch.bfloat16
    assert model_fingerprint(half) == reference.model_fingerprint
    finer = make_model("llama")  # of a float32 checkpoint, bfloat16 keeps a third of the bits
    coarse = copy.deepcopy(finer).to(torch.bfloat16)
    weight = finer.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, coarse.model.layers[0].mlp.up_proj.weight.float())
    assert model_fingerprint(coarse) == model_fingerprint(finer)


def test_a_fingerprint_notices_a_sampled_weight_and_a_shape() -> None:
    model = load(REFERENCE)
    before = model_fingerprint(model)
    weight = model.model.layers[3].mlp.up_proj.weight
    old = weight[0, 0].clone()
    weight[0, 0] += 0.5
    assert model_fingerprint(model) != before
    weight[0, 0] = old
    assert model_fingerprint(model) == before
    weight.data = weight.data.reshape(256, 704)
    assert model_fingerprint(model) != before


def test_a_tokenizers_fingerprint_notices_an_added_token(reference: AdaptiveEngine) -> None:
    tokenizer = load_tokenizer(REFERENCE)
    assert tokenizer_fingerprint(tokenizer) == reference.tokenizer_fingerprint
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != reference.tokenizer_fingerprint
