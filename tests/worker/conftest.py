from __future__ import annotations

import pytest
import torch

from offramp.worker import AdaptiveEngine
from support.models import FAMILIES, REFERENCE


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def reference() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(REFERENCE)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
