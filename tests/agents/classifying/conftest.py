from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.classifying.sequence_models import make_encoder
from support.tokenizers import word_tokenizer


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder on disk, with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder("bert").save_pretrained(folder)
    word_tokenizer(97).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 3 to 9 words, two classes told apart by which of two words is more frequent."""
    rng = np.random.default_rng(0)
    lines = ["text,label"]
    for number in range(240):
        sign = number % 2
        words = rng.integers(10, 97, rng.integers(1, 5)).tolist()
        words += [3 + sign] * 3 + [4 - sign] * int(rng.integers(0, 3))
        lines.append(" ".join(f"w{word}" for word in rng.permutation(words)) + f",{'ab'[sign]}")
    path = tmp_path_factory.mktemp("data") / "train.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
