"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import ascend, parse_exit
from offramp.deploy.serve.settings import Settings
from offramp.worker.decoding.request import KVMode
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.loading import check_model, layers_and_vocab, parse_dtype, require_device
from offramp.worker.model.precision import Precision
from offramp.worker.spec import WorkerSpec, load_engine

Model = Annotated[str, typer.Option(help="Model folder in Hugging Face format.")]
Corpus = Annotated[
    Path | None,
    typer.Option(
        help="Folder of *.py, *.txt and *.jsonl documents, or one such file.",
        show_default="the standard library",
    ),
]
Documents = Annotated[
    int, typer.Option(min=3, help="Documents taken from the corpus, over all splits.")
]
Dtype = Annotated[str, typer.Option(help="Weights' dtype: float32 or bfloat16.")]
Weights = Annotated[
    str,
    typer.Option(
        help="native, int8 or int4 (int4:64: in groups of 64; int4,native: the head as it is)."
    ),
]
DraftWeights = Annotated[
    str,
    typer.Option(
        help="Keep a copy with such weights, as int4, for drafts in verify.", show_default="none"
    ),
]
DraftExits = Annotated[
    str,
    typer.Option(
        help="With --for drafting: layers to draft after, those on a copy in fewer bytes first, "
        "like 12:int4,3,6. For prompts: layers after which tokens may leave, like 3,4.",
        show_default="those likeliest to pay",
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads per process.")]
SharedThreads = Annotated[
    str, typer.Option(help="Torch threads per worker; auto: this machine's usable cores / workers.")
]
CacheMode = Annotated[
    str, typer.Option(help="Layers that tokens skip, unless a request says: project|defer|verify.")
]
PrefillTokens = Annotated[int, typer.Option(help="Prompt tokens read between two launches.")]
MaxPending = Annotated[int, typer.Option(help="Tokens a row may leave pending (defer, verify).")]
CacheBudget = Annotated[
    float | None,
    typer.Option(help="MiB the cache may grow to.", show_default="as the context asks"),
]
PrefixCache = Annotated[
    float,
    typer.Option(help="MiB per worker for prompts' beginnings, which are not read again; 0: none."),
]
Translators = Annotated[
    Path | None, typer.Option(help="Folder that `offramp tune` wrote for this model.")
]
KeptTranslators = Annotated[
    Path | None,
    typer.Option(
        help="Folder that `offramp tune` wrote for this model.",
        show_default="what lies beside the policies",
    ),
]
Costs = Annotated[
    Path | None,
    typer.Option(
        help="Cost table of `offramp profile`.", show_default="as measured when recording"
    ),
]
OwnText = Annotated[
    bool, typer.Option("--own-text", help="Take what the model says after documents' beginnings.")
]
Temperature = Annotated[float, typer.Option(help="Of the model's own text; 0 is greedy.")]
PromptShare = Annotated[
    float, typer.Option(help="Share of an own text that is its document's beginning.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]

DEFAULT_MODEL = "models/reference"

T = TypeVar("T")


def parse_list(
    field: str, text: str, number: Callable[[str], T], what: str, like: str
) -> tuple[T, ...]:
    """Read comma-separated numbers of something.

    >>> parse_list("targets", ".9,.97", float, "shares", ".8,.9")
    (0.9, 0.97)

    Raises:
        ConfigError: something else is in the list.
    """
    try:
        return tuple(number(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            field, f"{text!r} is no list of {what}", f"Write it like {like}"
        ) from error


def parse_layers(field: str, text: str) -> tuple[int, ...]:
    """Read comma-separated layer numbers, which ascend from 1 on, or raise as ``parse_list``."""
    layers = parse_list(field, text, int, "layers", "3,6,9")
    if list(layers) != sorted(set(layers)) or any(layer < 1 for layer in layers):
        raise ConfigError(field, f"{text!r} does not ascend from 1 on", "Write it like 3,6,9")
    return layers


def parse_exits(field: str, text: str) -> tuple[int, ...]:
    """Read comma-separated exits, those on a copy first, or raise as ``parse_list``.

    >>> parse_exits("exits", "6:int4,12:int4,3")
    (6:int4, 12:int4, 3)
    """
    like = "12:int4,3,6"
    exits = parse_list(field, text, parse_exit, "exits", like)
    if not ascend(exits):
        problem = f"{text!r} does not ascend from 1 on, those on a copy first"
        raise ConfigError(field, problem, f"Write it like {like}")
    return exits


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_threads(text: str, workers: int) -> int:
    """Torch threads of each of some workers on this machine.

    >>> parse_threads("3", workers=2)
    3
    >>> parse_threads("auto", workers=10_000)
    1

    Raises:
        ConfigError: neither ``auto`` nor a number from 1 on.
    """
    if text == "auto":
        return max(1, usable_cores() // workers)
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and int(text)):
        raise ConfigError("threads", f"{text!r} is no number of threads", "Use auto, or 1 or more")
    return int(text)


def engine_config(
    kv_mode: str, max_pending: int, translators: Path | None, weights: str
) -> EngineConfig:
    """Read the settings of an engine that measures policies.

    Raises:
        ConfigError: a cache mode or weights that are unknown, or a number below its bound.
    """
    return EngineConfig(
        kv_mode=parse_kv_mode(kv_mode),
        max_pending=max_pending,
        translators=translators and translators.resolve(),
        precision=Precision.parse(weights),
    )


def parse_kv_mode(text: str) -> KVMode:
    """For the type checker: ``EngineConfig`` is what refuses an unknown mode."""
    return cast(KVMode, text)


def options_typed(context: typer.Context) -> dict[str, Any]:
    """The options of a command that were typed, by name."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name: context.params[name]
        for name, source in sources.items()
        if source is not None and source.name != "DEFAULT"
    }


def require_meant(context: typer.Context, meant: Collection[str], problem: str) -> dict[str, Any]:
    """The options of a command that were typed, by name, none of which means nothing here.

    Raises:
        ConfigError: one of them is not among those that mean something.
    """
    typed = options_typed(context)
    require_unused({name: name not in meant for name in sorted(typed)}, problem)
    return typed


def require_unused(given: Mapping[str, object], problem: str) -> None:
    """Refuse the first of some options that was given, for a problem that they share.

    Raises:
        ConfigError: naming it.
    """
    for name, value in given.items():
        if value:
            raise ConfigError(name, problem, "Leave it out")


def require_new_folder(field: str, folder: Path, but: str = "") -> None:
    """Refuse to write among files that are there already.

    Args:
        field: The option that names the folder.
        folder: The folder.
        but: Name of a file that may be there, if it is the only one.

    Raises:
        ConfigError: there is a file, or a folder that is not empty.
    """
    if folder.exists() and (
        not folder.is_dir() or {each.name for each in folder.iterdir()} - {but}
    ):
        raise ConfigError(field, f"{folder} is not a new or empty folder", "Name another")


def require_writable(field: str, file: Path) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what goes into it.

    Raises:
        ConfigError: it is a folder, or no file can be made where it is to be.
    """
    place = next(path for path in (file.parent, *file.parent.parents) if path.exists())
    if file.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(field, f"{file} cannot be written", "Name a file in a writable folder")


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
        ConfigError: the dtype is unknown, the device is not there, or the engine's settings do
            not fit the model.
    """
    check_model(spec.model)
    parse_dtype(spec.dtype)
    if settings.ray_address is None:  # a cluster's workers may have devices that we lack
        require_device(spec.device)
    layers, holds = layers_and_vocab(spec.model)[0], spec.engine.schedule.holds
    if holds and holds[-1] >= layers:
        raise ConfigError(
            "hold", f"{holds[-1]} is not below the model's {layers} layers", "Hold earlier"
        )
    # Only the weights tell whether translators and costs are theirs and kernels fit them, and only
    # the cache its block's size.
    engine = spec.engine
    known = EngineConfig(
        kv_mode=engine.kv_mode,
        schedule=replace(engine.schedule, costs=None),
        prefill_tokens=engine.prefill_tokens,
        max_pending=engine.max_pending,
    )
    if engine != known:
        load_engine(replace(spec, device="cpu"))
