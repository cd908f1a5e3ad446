"""Options of ``offramp serve`` that no other command has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.controller.costs.cost_file import load_costs
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.serve.placing.pool_growth import PoolGrowth
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule

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
Holds = Annotated[
    list[str] | None,
    typer.Option(help="Depths where rows wait for company, like 6,9; may be repeated."),
]
HoldRows = Annotated[int, typer.Option(help="So many waiting rows go on together.")]
HoldPatience = Annotated[int, typer.Option(help="Launches of others that a row waits for at most.")]
Together = Annotated[
    bool, typer.Option("--together", help="Rows bound for the end wait, and are verified at once.")
]
ScheduleCosts = Annotated[
    Path | None, typer.Option(help="Table of `offramp profile`; launches are chosen by it.")
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

GROW_AFTER_S, SHRINK_AFTER_S = 10.0, 600.0
"""Where nobody says."""

PROMPT_KEEP = "4,32"
"""Where nobody says."""

OF_DECODING = (
    *("kv_mode", "max_pending", "translators", "weights", "draft_weights", "hold", "hold_rows"),
    *("hold_patience", "together", "costs", "prefill_tokens", "prefill", "prompt_policy"),
    *("prompt_keep", "kv_budget_mb", "prefix_cache_mib"),
)
"""Options that mean nothing to a model that classifies."""


def growth_of(given: dict[str, Any]) -> PoolGrowth | None:
    """How far the pool may grow, from the options of the command.

    Raises:
        ConfigError: an option is out of range, or means nothing to a pool that does not grow.
    """
    if given["max_replicas"] is None:
        unsaid = {"grow_after": GROW_AFTER_S, "shrink_after": SHRINK_AFTER_S}
        for name in ("target_requests", "target_tokens", *unsaid):
            if given[name] != unsaid.get(name):
                raise ConfigError(name, "the pool does not grow", "Give --max-replicas, too")
        return None
    return PoolGrowth(
        most=given["max_replicas"],
        completions=given["target_requests"] or given["slots"],
        tokens=given["target_tokens"],
        up_s=given["grow_after"],
        down_s=given["shrink_after"],
    )


def parse_schedule(
    holds: Sequence[str] | None,
    rows: int,
    patience: int,
    *,
    together: bool = False,
    costs: Path | None = None,
) -> Schedule:
    """Read a schedule: lock-step, cohorts that wait at holds, together, or chosen by costs.

    >>> parse_schedule(["3", "6,9"], 2, 4).holds
    (3, 6, 9)

    Raises:
        ConfigError: holds that do not ascend, holds beside another schedule, a number below its
            bound or that nothing reads, or a table that cannot be read.
    """
    depths = options.parse_layers("hold", ",".join(holds or ()))
    table = None if costs is None else load_costs(costs)
    try:
        schedule = Schedule(
            holds=depths, rows=rows, patience=patience, together=together, costs=table
        )
    except ConfigError as error:
        field = "hold" if error.field == "holds" else f"hold_{error.field}"
        raise ConfigError(field, error.problem, error.remedy) from error
    if not (depths or together or costs) and schedule != LOCKSTEP:
        field = "hold_rows" if rows != LOCKSTEP.rows else "hold_patience"
        raise ConfigError(
            field, "does nothing without a hold", "Give --hold, --together or --costs"
        )
    if costs is not None and rows != LOCKSTEP.rows:
        raise ConfigError("hold_rows", "does nothing beside --costs", "Leave one of them out")
    return schedule
