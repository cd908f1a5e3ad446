"""Options of ``offramp serve`` that no other command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.controller.errors import ConfigError
from offramp.deploy.serve.placing.pool_growth import PoolGrowth

Trust = Annotated[
    Path | None,
    typer.Option(help="Publisher's public key.", show_default="the one in OFFRAMP_HOME"),
]
PromptPolicy = Annotated[
    Path | None,
    typer.Option(
        help="Bundle of a policy for prompts, which requests may ask for.", show_default="none"
    ),
]
PrefillWay = Annotated[
    str, typer.Option(help="How prompts are read unless a request says: full|exits.")
]
PromptKeep = Annotated[
    str, typer.Option(help="First and last tokens of a prompt that run every layer, like 4,32.")
]
Classify = Annotated[
    Path | None,
    typer.Option(
        help="Classify, with a folder of heads (`tune --task classify`).", show_default="decode"
    ),
]
Models = Annotated[
    Path | None,
    typer.Option(
        help="TOML file: a table per model, named as clients ask for it, of options like these.",
        show_default="one model",
    ),
]
ServedName = Annotated[
    str | None, typer.Option(help="Name clients ask for.", show_default="the folder's name")
]
RedisPort = Annotated[
    int, typer.Option(min=1, max=65535, help="Port of the embedded Redis (no REDIS_URL).")
]
MaxBodyBytes = Annotated[int, typer.Option(min=1, help="Bytes of a body; more get 413.")]
MaxChoices = Annotated[
    int, typer.Option(min=1, help="Completions of one request, all its prompts together.")
]
Deadline = Annotated[
    float, typer.Option(help="Seconds from a request's beginning to its last token; then 504.")
]
Drain = Annotated[
    float, typer.Option(help="Seconds that requests have for their end when the pool is stopped.")
]
LogFormat = Annotated[
    str | None,
    typer.Option(
        help="Write each request and each warning of the pool to standard error: text|json.",
        show_default="none is written",
    ),
]
Replicas = Annotated[int, typer.Option(min=1, help="Workers in the pool; at least, if it grows.")]
MaxReplicas = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most workers: the pool grows and shrinks with its load.", show_default="fixed"
    ),
]
TargetRequests = Annotated[
    float | None,
    typer.Option(
        help="Completions per worker that a pool is to grow to, running and waiting.",
        show_default="--slots",
    ),
]
TargetTokens = Annotated[
    float | None,
    typer.Option(
        help="Tokens per worker, of prompts and all that they may make, besides.",
        show_default="not counted",
    ),
]
GrowAfter = Annotated[float, typer.Option(help="Seconds of too much to do, until it grows.")]
ShrinkAfter = Annotated[float, typer.Option(help="Seconds of too little, until it shrinks.")]


def growth_of(given: dict[str, Any]) -> PoolGrowth | None:
    """How far the pool may grow, from the options of the command.

    Raises:
        ConfigError: an option is out of range, or means nothing to a pool that does not grow.
    """
    if given["max_replicas"] is None:
        for name in ("target_requests", "target_tokens"):
            if given[name] is not None:
                raise ConfigError(name, "the pool does not grow", "Give --max-replicas, too")
        return None
    return PoolGrowth(
        most=given["max_replicas"],
        completions=given["target_requests"] or given["slots"],
        tokens=given["target_tokens"],
        up_s=given["grow_after"],
        down_s=given["shrink_after"],
    )
