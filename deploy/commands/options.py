"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.controller.errors import ConfigError
from offramp.deploy.settings import Settings
from offramp.worker.actor import WorkerSpec
from offramp.worker.loading import check_model, parse_dtype, require_device

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
        ConfigError: something else is in the list, or the layers do not ascend from 1 on.
    """
    try:
        layers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(field, f"{text!r} is no list of layers", "Write it like 3,6,9") from error
    if list(layers) != sorted(set(layers)) or any(layer < 1 for layer in layers):
        raise ConfigError(field, f"{text!r} does not ascend from 1 on", "Write it like 3,6,9")
    return layers


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


def require_new_folder(field: str, folder: Path) -> None:
    """Refuse to write among files that are there already.

    Raises:
        ConfigError: there is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(field, f"{folder} is not a new or empty folder", "Name another")


def require_folder(field: str, folder: Path) -> None:
    """Refuse to write a folder where a file is.

    Raises:
        ConfigError: there is one.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(field, f"{folder} is no folder", "Name another")


def require_loadable(spec: WorkerSpec, settings: Settings) -> None:
    """Refuse what no worker could load, before Ray is started for it.

    Raises:
        ModelError: the model cannot be served.
        ConfigError: the dtype is unknown, or the device is not there.
    """
    check_model(spec.model)
    parse_dtype(spec.dtype)
    if settings.ray_address is None:  # a cluster's workers may have devices that we lack
        require_device(spec.device)
