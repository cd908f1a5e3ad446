from __future__ import annotations

from typing import Any

import pytest

from support.tokenizers import word_tokenizer


@pytest.fixture(scope="session")
def words() -> Any:
    return word_tokenizer(97)
