"""What ``offramp doctor`` says of a model's exits."""

from __future__ import annotations

import pytest

from offramp.deploy.cli.doctor import advice, agreement_by_layer
from offramp.worker.spec import WorkerSpec, load_engine
from support.models import REFERENCE


def test_exits_of_a_model_trained_to_exit_are_fine() -> None:
    found = agreement_by_layer(load_engine(WorkerSpec(model=str(REFERENCE))))
    assert list(found) == [1, 3, 4, 6, 7, 9, 10, 11]
    assert found[3] < found[9]
    assert advice(found, "m").startswith("fine")


@pytest.mark.parametrize("late", [0.3, 0.95])
def test_exits_that_agree_only_late_are_to_be_tuned(late: float) -> None:
    assert "offramp tune --model m" in advice({4: 0.02, 8: 0.05, 15: 0.1, 29: late}, "m")
