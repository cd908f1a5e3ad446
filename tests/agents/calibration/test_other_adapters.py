"""A policy that names adapters is not measured through others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from offramp.agents.calibration.calibrate import require_adapters
from offramp.controller.errors import ConfigError
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine, EngineConfig
from support.models import make_model, save_adapters


def bundle(adapters: str) -> PolicyBundle:
    packed = pack_policy(FixedExit(1), np.zeros((2, 3), np.float32))
    facts = {"model": "aa", "tokenizer": "bb", "training": {}, "metrics": {}, "created_at": 0.0}
    return PolicyBundle.draft(packed, adapters=adapters, **facts)  # type: ignore[arg-type]


def test_a_policy_is_measured_through_the_adapters_that_it_names(tmp_path: Path) -> None:
    folder = save_adapters("llama", tmp_path / "tuned", (1,))
    engine = AdaptiveEngine(make_model("llama"), config=EngineConfig(translators=folder))
    for named in ("", engine.decoder.translators.digest):
        require_adapters(bundle(named), engine)
    with pytest.raises(ConfigError, match=r"through adapters aaaaaaaaaaaa, .* are loaded"):
        require_adapters(bundle("a" * 64), engine)
    with pytest.raises(ConfigError, match="none are loaded"):
        require_adapters(bundle("a" * 64), AdaptiveEngine(make_model("llama")))
