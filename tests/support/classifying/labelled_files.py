"""A random encoder on disk, and files of texts with labels that its heads can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.classifying.sequence_models import make_encoder
from support.tokenizers import word_tokenizer


def encoder_folder(folder: Path) -> Path:
    """A random encoder, with a tokenizer of words."""
    make_encoder("bert").save_pretrained(folder)
    word_tokenizer(97).save_pretrained(folder)
    return folder


def labelled_file(path: Path, texts: int = 240, seed: int = 0) -> Path:
    """Texts of 3 to 9 words, two classes told apart by which of two words is more frequent."""
    rng = np.random.default_rng(seed)
    lines = ["text,label"]
    for number in range(texts):
        sign = number % 2
        words = rng.integers(10, 97, rng.integers(1, 5)).tolist()
        words += [3 + sign] * 3 + [4 - sign] * int(rng.integers(0, 3))
        lines.append(" ".join(f"w{word}" for word in rng.permutation(words)) + f",{'ab'[sign]}")
    path.write_text("\n".join(lines) + "\n")
    return path
