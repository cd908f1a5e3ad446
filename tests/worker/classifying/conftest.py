from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.classifying.served_texts import Served
from support.tokenizers import word_tokenizer


@pytest.fixture(scope="session")
def words() -> Any:
    return word_tokenizer(97)


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    found.service.start()
    yield found
    found.service.stop()
