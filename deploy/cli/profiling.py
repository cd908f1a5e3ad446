"""Run ``offramp profile``: measure what a token's parts cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from offramp.controller.costs.cost_file import save_costs
from offramp.controller.costs.pace import FREE_GROWTH, knee_of
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import MAX_PENDING, IntArray
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, progress, say
from offramp.deploy.cli.tables import costs_table, spans_table
from offramp.deploy.serve.settings import Settings
from offramp.envs.traces.candidate_file import load_candidates
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.loading import layers_and_vocab
from offramp.worker.model.precision import Precision
from offramp.worker.profiling.profile import Profile, measure_costs
from offramp.worker.profiling.rounds import ProfileConfig
from offramp.worker.spec import WorkerSpec, load_engine

LimitS = Annotated[
    float, typer.Option(help="Stop after so many seconds in any case, not counting setting up.")
]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("profile")(profile)


def profile(
    out: Annotated[Path, typer.Option(help="File for the cost table (JSON).")],
    model: options.Model = options.DEFAULT_MODEL,
    traces: Annotated[
        Path | None,
        typer.Option(
            help="Recording whose candidate table is probed.", show_default="a random table"
        ),
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=2, help="Candidate tokens per token of a random table.")
    ] = 64,
    rows: Annotated[str, typer.Option(help="Rows in a launch to measure at.")] = "1,2,4,8,16",
    tokens: Annotated[
        str, typer.Option(help="Tokens of one row to measure at (verifying passes).")
    ] = "1,2,3,5,7,9",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 128,
    exits: Annotated[
        str, typer.Option(help="Layers to probe, like 3,6,9.", show_default="quarters of the depth")
    ] = "",
    half_width: Annotated[
        float, typer.Option(help="Go on until no 95 % interval is wider than ± this share.")
    ] = 0.05,
    limit_s: LimitS = 300.0,
    dtype: options.Dtype = "float32",
    weights: options.Weights = "native",
    draft_weights: options.DraftWeights = "",
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    translators: options.Translators = None,
) -> None:
    """Measure what layers, head, probes, decisions and fills cost on this machine."""
    config = ProfileConfig(
        rows=options.parse_layers("rows", rows),
        tokens=options.parse_layers("tokens", tokens),
        context=context,
        exits=options.parse_layers("exits", exits),
        half_width=half_width,
        limit_s=limit_s,
    )
    spec = WorkerSpec(
        model=model,
        dtype=dtype,
        device=device,
        threads=threads,
        slots=config.rows[-1],
        engine=EngineConfig(
            translators=translators,
            max_pending=max(MAX_PENDING, config.tokens[-1] - 1),
            precision=Precision.parse(weights),
            draft_precision=Precision.of_copy(draft_weights),
        ),
    )
    options.require_writable("out", out)
    options.require_loadable(spec, Settings.from_environment())
    table_VK = _candidates(model, traces, candidates)
    with progress("profile", "s") as advance:
        engine, tell = load_engine(spec), lambda *seconds: advance(*map(round, seconds))
        found = measure_costs(engine, table_VK, config, tell)
    _save(found, half_width, out)


def _save(found: Profile, half_width: float, out: Path) -> None:
    """Write what was found, and say what it is."""
    save_costs(out, found.costs)
    _show(found.costs)
    _warn(found, half_width)
    console.print(
        f"{found.rounds} rounds in {found.seconds:.0f} s, after {found.setup_s:.0f} s of setting "
        f"up → {out}"
    )


def _warn(found: Profile, half_width: float) -> None:
    """Say which intervals are not what was asked for."""
    if found.bare:
        bare = [key for key in found.bare if key.table not in found.costs.probes]
        places = dict.fromkeys(f"{key.table} {key.size}" for key in bare or found.bare)
        warning = (
            f"no interval (±?) of {', '.join(places)}: every part has one after about "
            f"{found.enough_s:.0f} s here; raise --limit-s or ask for fewer rows"
        )
    elif found.loose:
        parts = ", ".join(f"{key.part} ({key.table} {key.size})" for key in found.loose)
        warning = f"wider than ±{half_width:.0%} after {found.rounds} rounds: {parts}"
    else:
        return
    say(f"[yellow]warning[/] {warning}")


def _show(costs: CostTable) -> None:
    console.print(f"{costs.machine}; {costs.context} tokens in the cache; {costs.clock}")
    console.print(costs_table(costs))
    console.print(spans_table(costs))
    say(f"up to {knee_of(costs)} rows a layer takes at most {FREE_GROWTH:g} times one row's time")
    joules = costs.at(1).full_j
    energy = "unknown" if joules is None else f"{joules * 1e3:.2f} mJ"
    say(
        f"a token at full depth: {costs.full_s * 1e3:.2f} ms, {energy} "
        f"({costs.energy_method}: {costs.energy_source})"
    )


def _candidates(model: str, traces: Path | None, candidates: int) -> IntArray:
    """A recording's table, or one of random tokens; both have a row per token of the model."""
    vocab = layers_and_vocab(model)[1]
    if traces is not None:
        table_VK = load_candidates(traces)
        if len(table_VK) != vocab:
            raise ConfigError(
                "traces", f"{traces} is of a vocabulary of {len(table_VK)}, not {vocab}"
            )
        return table_VK
    if candidates > vocab:
        raise ConfigError("candidates", f"{candidates} exceed the vocabulary of {vocab}")
    rng = np.random.default_rng(0)
    # Every row a window of one shuffled ring: distinct within a row, different between rows.
    ring_V = rng.permutation(vocab).astype(np.int32)
    places_VK = (np.arange(vocab)[:, None] * candidates + np.arange(candidates)) % vocab
    return np.ascontiguousarray(ring_V[places_VK])
