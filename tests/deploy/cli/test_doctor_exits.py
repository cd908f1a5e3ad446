"""What ``offramp doctor`` says of a model's exits."""

from __future__ import annotations

import pytest

from offramp.agents.drafting.likely_exits import LikelyExit, best_of, likely_exits
from offramp.deploy.cli.doctor import advice
from offramp.worker.spec import WorkerSpec, load_engine
from support.models import REFERENCE


def test_exits_of_a_model_trained_to_exit_are_fine() -> None:
    found = likely_exits(load_engine(WorkerSpec(model=str(REFERENCE))), parts=8)
    by_layer = {each.layer: each for each in found}
    assert list(by_layer) == [1, 3, 4, 6, 7, 9, 10, 11]
    assert by_layer[3].agreement < by_layer[9].agreement
    assert by_layer[6].pays
    assert not by_layer[1].pays
    assert 6 in best_of(found)
    assert advice(found, "m").startswith("fine")


@pytest.mark.parametrize("late", [0.3, 0.95])
def test_exits_that_agree_only_late_are_to_be_tuned(late: float) -> None:
    shares = {4: 0.02, 8: 0.05, 15: 0.1, 29: late}
    exits = [LikelyExit(layer=n, agreement=share, rate=1.0) for n, share in shares.items()]
    assert "offramp tune --model m" in advice(exits, "m")
