"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.controller.errors import ConfigError

Model = Annotated[str, typer.Option(help="Model folder in Hugging Face format.")]
Corpus = Annotated[
    Path | None,
    typer.Option(help="Folder of *.py and *.txt documents [default: the standard library]."),
]
Documents = Annotated[
    int, typer.Option(min=3, help="Documents taken from the corpus, over all splits.")
]
Dtype = Annotated[str, typer.Option(help="Weights' dtype: float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads per process.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]

DEFAULT_MODEL = "models/reference"


def parse_layers(field: str, text: str) -> tuple[int, ...]:
    """Comma-separated layer numbers.

    >>> parse_layers("exits", "3,6")
    (3, 6)

    Raises:
        ConfigError: something else is in the list.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(field, f"{text!r} is no list of layers", "Write it like 3,6,9") from error


def parse_shares(field: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers in (0, 1).

    Raises:
        ConfigError: something else is in the list.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            field, f"{text!r} is no list of numbers", "Write it like .9,.97"
        ) from error
