"""Translators in the decode loop: they change what is read at an exit, and nothing else.

Shape suffixes: r rank, D width.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.model.translators import ExitTranslators, Translator
from support.models import SHAPE, make_model

PROMPT = [5, 17, 33, 2, 41]
SAMPLING = SamplingParams(max_tokens=20, ignore_eos=True)
EXIT = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    width = SHAPE["hidden_size"]
    down_rD, up_Dr, shift_D = torch.randn(4, width), torch.randn(width, 4), torch.randn(width)
    engine = AdaptiveEngine(make_model("llama"))
    facts = {"model": engine.model_fingerprint, "layers": engine.stack.layers, "width": width}
    ExitTranslators({EXIT: Translator(down_rD, up_Dr, shift_D)}).save(tmp_path, facts)
    return tmp_path


def test_a_translator_changes_what_an_exit_emits(folder: Path) -> None:
    plain = AdaptiveEngine(make_model("llama"))
    translated = AdaptiveEngine(make_model("llama"), config=EngineConfig(translators=folder))
    early = [e.generate(PROMPT, SAMPLING, FixedExit(EXIT))[0] for e in (plain, translated)]
    assert early[0].token_ids != early[1].token_ids
    full = [e.generate(PROMPT, SAMPLING)[0] for e in (plain, translated)]
    assert full[0].token_ids == full[1].token_ids


def test_the_emitted_token_is_the_translated_states(folder: Path) -> None:
    engine = AdaptiveEngine(make_model("llama"), config=EngineConfig(translators=folder))
    [completion] = engine.generate(PROMPT, SamplingParams(max_tokens=2), FixedExit(EXIT))
    fed = [*PROMPT, completion.token_ids[0]]
    states = engine.model(torch.tensor([fed]), output_hidden_states=True).hidden_states
    read_ND = engine.decoder.translators.apply(EXIT, states[EXIT][0, -1:])
    assert completion.token_ids[1] == int(engine.stack.logits(read_ND).argmax())


def test_verified_drafts_are_full_depths_whatever_the_translator(folder: Path) -> None:
    engine = AdaptiveEngine(make_model("llama"), config=EngineConfig(translators=folder))
    [full] = engine.generate(PROMPT, SAMPLING)
    [drafted] = engine.generate(PROMPT, SAMPLING, FixedExit(EXIT), kv_mode="verify")
    assert drafted.token_ids == full.token_ids
    assert drafted.stats.drafts > 0


def test_translators_of_another_model_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="translators"):
        AdaptiveEngine(make_model("qwen2"), config=EngineConfig(translators=folder))
