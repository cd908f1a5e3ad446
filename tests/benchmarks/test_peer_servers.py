"""Servers that serve.py asks beside ours: how they are started, and what one of ours streams."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from serving.peers.generate_server import serving as generating
from serving.peers.peer_rounds import PeerRound, peer_rows
from serving.peers.peer_servers import OURS, PeerModel, listening
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.models import REFERENCE


def test_generate_behind_fastapi_streams_what_generate_says(tmp_path: Path) -> None:
    folder = PeerModel(REFERENCE).endless(tmp_path)
    model, tokenizer = (
        each.from_pretrained(folder) for each in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.config.eos_token_id is None
    ids = tokenizer("import os\n", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert len(said) == 12
    body = {"prompt": "import os\n", "max_tokens": 12}
    reply = TestClient(generating(model, tokenizer)).post("/v1/completions", json=body)
    *events, end = reply.text.strip().split("\n\n")
    choices = [json.loads(each.removeprefix("data: "))["choices"][0] for each in events]
    assert "".join(each["text"] for each in choices) == tokenizer.decode(said)
    assert [each["finish_reason"] for each in choices][-1] == "length"
    assert end == "data: [DONE]"


def test_all_serve_the_same_weights(tmp_path: Path) -> None:
    copied = AutoModelForCausalLM.from_pretrained(
        PeerModel(REFERENCE, "bfloat16").endless(tmp_path), dtype="auto"
    )
    assert copied.dtype is torch.bfloat16
    own = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.bfloat16).state_dict()
    for name, value in copied.state_dict().items():
        assert torch.equal(value, own[name]), name


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit('there is no such model')"]
    with (
        pytest.raises(RuntimeError, match="there is no such model"),
        listening(tmp_path / "log", words, 1),
    ):
        pass


def test_rounds_are_held_against_ours_of_the_same_round() -> None:
    ours = [PeerRound(100.0, 0.1, 0.01, 0.002), PeerRound(50.0, 0.2, 0.02, 0.004)]
    peer = [PeerRound(50.0, 0.1, 0.02, 0.002), PeerRound(25.0, 0.2, 0.04, 0.004)]
    rate, first, later, cpu = peer_rows("a peer", 4, peer, ours)
    assert (rate.what, rate.streams, rate.ratio) == ("a peer: throughput", 4, 0.5)
    assert (first.ratio, later.ratio, cpu.ratio) == (1.0, 2.0, 1.0)
    assert (rate.value, later.value, later.baseline) == (37.5, 30.0, 15.0)
    assert {each.ratio for each in peer_rows(OURS, 4, ours, ours)} == {1.0}
