"""Files that some command wrote, damaged: each reader says which one it is, in one typed error."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offramp.agents.calibration.pick import EVALUATION, load_rows
from offramp.agents.placing.contenders import INDEX, load_contenders
from offramp.agents.recording.corpus import SPLIT, recorded_digests
from offramp.controller.adapters.adapter_folder import DESCRIPTION
from offramp.controller.costs.cost_file import load_costs
from offramp.controller.errors import FieldError
from offramp.envs.traces.candidate_file import CANDIDATES, load_candidates
from offramp.envs.traces.store import TraceStore
from offramp.worker.model.translators import ExitTranslators


def zipped() -> bytes:
    """An archive of arrays where one array is expected."""
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(2))
    return buffer.getvalue()


def cut_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b" * 500)
    return buffer.getvalue()[:100]


def load_translators(folder: Path) -> Any:
    return ExitTranslators.load(folder, "f" * 64, 12, 8, torch.float32, "cpu")


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "traces": ("manifest.json", TraceStore.open),
    "candidates": (CANDIDATES, load_candidates),
    "split": (SPLIT, recorded_digests),
    "costs": ("costs.json", lambda folder: load_costs(folder / "costs.json")),
    "policies": (INDEX, load_contenders),
    "evaluation": (EVALUATION, load_rows),
    "translators": (DESCRIPTION, load_translators),
}

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "garbage": b"abc",
    "no UTF-8": b"\xff\xfe\x80",
    "null bytes": b"\x00" * 64,
    "number": b"3",
    "null": b"null",
    "list": b"[3]",
    "object": b'{"a": 3}',
    "odd object": b'{"version": [1], "format": {}, "test": 3, "validation": 3}',
    "deep": b"[" * 200_000,
    "pickle": b"\x80\x04cos\nsystem\n",
    "archive": zipped(),
    "cut archive": cut_zip(),
    "cut array": b"\x93NUMPY\x01\x00v\x00{'descr'",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_one_typed_error(tmp_path: Path, reader: str, content: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(CONTENTS[content])
    with pytest.raises(FieldError) as refused:
        read(tmp_path)
    message = str(refused.value)
    assert str(tmp_path) in message
    assert refused.value.remedy
