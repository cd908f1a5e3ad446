from __future__ import annotations

from pathlib import Path

import pytest

from support.classifying.labelled_files import encoder_folder, labelled_file


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder on disk, with a tokenizer of words."""
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two classes, told apart by which of two words is more frequent."""
    return labelled_file(tmp_path_factory.mktemp("data") / "train.csv")
