"""Where ``offramp train --for drafting`` drafts when nobody says."""

from __future__ import annotations

import pytest

from offramp.agents.drafting import likely_exits
from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.deploy.cli.drafting import with_exits
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.spec import WorkerSpec, load_engine
from support.models import REFERENCE

CONFIG = DraftingConfig(model=str(REFERENCE), documents=24)


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return load_engine(WorkerSpec(model=str(REFERENCE), slots=1))


def test_it_is_at_the_exits_that_are_likeliest_to_pay(engine: AdaptiveEngine) -> None:
    config, same = with_exits(CONFIG, engine)
    assert same is engine
    assert len(config.exits) == likely_exits.MOST
    assert config.candidates == CONFIG.candidates


def test_where_none_pays_it_is_on_a_copy_of_all_layers(
    engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likely_exits, "PAYS", 9.0)
    config, copied = with_exits(CONFIG, engine)
    assert repr(config.exits) == "(12:int4,)"
    assert config.candidates == 0
    assert copied.config.draft_precision is not None
    assert copied.config.draft_precision.weights == "int4"
