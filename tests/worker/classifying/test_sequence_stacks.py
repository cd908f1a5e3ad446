"""Stacks over sequences against Hugging Face's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from offramp.controller.errors import ModelError, RequestError
from offramp.worker.classifying.decoders import DecoderStack
from offramp.worker.classifying.encoders import ENCODERS
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.sequence_stack import SequenceBatch, SequenceStack
from offramp.worker.model.families import stack_for
from support.classifying.sequence_models import ENCODER_CLASSES, RAGGED, encoder_stack, make_encoder
from support.models import make_model, truncated

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.15}
DECODERS = ("llama", "qwen3", "gemma", "gpt2", "opt", "gpt-neox")


def hugging_face(model: Any, dtype: torch.dtype) -> torch.Tensor:
    """Means over the tokens of the last states, of a padded batch."""
    longest = max(map(len, RAGGED))
    tokens = torch.tensor([[*each, *[0] * (longest - len(each))] for each in RAGGED])
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in RAGGED])
    out = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    means: torch.Tensor = (out * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return means


def ours(stack: SequenceStack, layers: int) -> torch.Tensor:
    batch = SequenceBatch(stack, RAGGED)
    for index in range(layers):
        batch.run_layer(index)
    return batch.pooled("mean")


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ENCODER_CLASSES)
def test_an_encoder_is_hugging_faces_at_each_depth(family: str, dtype: torch.dtype) -> None:
    stack = encoder_stack(family, dtype)
    for layers in (1, 3, 5):
        expected = hugging_face(make_encoder(family, dtype, layers), dtype)
        assert torch.allclose(ours(stack, layers), expected, atol=TOLERANCES[dtype])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_is_hugging_faces_at_each_depth(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    stack = DecoderStack(stack_for(model))
    for layers in (2, 5):
        expected = hugging_face(truncated(model, layers).base_model, dtype)
        found = ours(stack, layers)
        scale = max(1.0, float(expected.abs().max()))
        assert torch.allclose(found, expected, atol=TOLERANCES[dtype] * scale)


@torch.inference_mode()
@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_a_row_is_the_same_alone_and_after_others_left(pool: Any) -> None:
    stack = encoder_stack()
    batch = SequenceBatch(stack, RAGGED)
    alone = SequenceBatch(stack, RAGGED[1:2])
    for index in range(5):
        batch.run_layer(index)
        alone.run_layer(index)
        if index == 1:
            batch.keep(torch.tensor([False, True, True]).numpy())
        if index == 3:
            batch.keep(torch.tensor([True, False]).numpy())
    assert batch.rows.tolist() == [1]
    assert (batch.launches, batch.row_layers) == (5, 3 * 2 + 2 * 2 + 1)
    assert torch.allclose(batch.pooled(pool), alone.pooled(pool), atol=2e-5)


@torch.inference_mode()
def test_hidden_padding_is_what_makes_rows_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without the mask, rows see the padding of others."""
    expected = hugging_face(make_encoder("bert"), torch.float32)
    monkeypatch.setattr(
        "offramp.worker.classifying.encoders.padding_mask", lambda x_BTD, lengths: None
    )
    assert not torch.allclose(ours(encoder_stack(), 5), expected, atol=1e-2)


def test_robertas_context_ends_where_its_positions_do() -> None:
    assert encoder_stack("roberta").context == 64 - 1
    with torch.inference_mode():
        SequenceBatch(encoder_stack("roberta"), [[5] * 63])


def test_an_encoder_made_causal_is_refused() -> None:
    model = make_encoder("bert")
    model.config.is_decoder = True
    with pytest.raises(ModelError, match="causal"):
        ENCODERS["bert"](model)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerBase) -> Any:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder("bert").save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_folder_is_read_with_its_tokenizer(saved: Any) -> None:
    model = SequenceModel.load(saved)
    assert model.encode(["w5 w6 w7", "w9"]) == [[5, 6, 7], [9]]
    model.tokenizer.num_special_tokens_to_add = lambda pair=False: 2  # as BERT's sets them
    with pytest.raises(RequestError, match=r"input\[1\]: has no token"):
        model.encode(["w5 w6 w7", "w9 w9"])
    assert model.fingerprint == SequenceModel.load(saved, torch.bfloat16).fingerprint


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), (" \n", "is empty"), ("w5 " * 65, "has 65 tokens")]
)
def test_a_text_that_cannot_be_read_is_named(saved: Any, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as raised:
        SequenceModel.load(saved).encode(["w5", text])
    assert raised.value.field == "input[1]"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("w5 w6", "input: 'w5 w6' is no list of texts"),
        (None, "input: None is no list of texts"),
        (iter(["w5"]), "input: .* is no list of texts"),
        ([], "input: is empty"),
        (["w5", None], r"input\[1\]: None is no text"),
        (["w5", "\ud800"], r"input\[1\]: holds half of a surrogate pair at index 0"),
    ],
)
def test_what_is_no_list_of_texts_is_named(saved: Any, texts: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        SequenceModel.load(saved).encode(texts)
