"""How much of the physical bound does the engine turn into time?

Full depth, Hugging Face's ``generate`` (KV cache, sdpa), its ``assistant_early_exit``, and exits at
several mean depths in each cache mode, lock-step and in cohorts, interleaved in one process on the
same prompts. Weights are random (those of the reference model are trained) and exit depths come
from a seeded script, so speed does not depend on luck. After the exit layer, the random models'
layers write little into the residual stream, so that drafts are mostly right, as in a model
trained to exit; ``accepted`` says how often.

    python benchmarks/decode.py --json decode.json
    python benchmarks/decode.py --quick
    python benchmarks/decode.py --drafting --dtypes bfloat16 --batches 1,2,4,8,16,32 --threads 1
    python benchmarks/decode.py --model models/smollm2 --dtypes bfloat16 --batches 1
    python benchmarks/decode.py --device cuda --engines "HF static,kernel by kernel" --json gpu.json
    python benchmarks/decode.py --show docs/decoding.json --shapes reference --batches 1,8

The third drafts with a fixed exit and length in ``verify`` on the reference model, in lock-step,
verified together, and priced by costs that it profiles first; each takes steps in turn with full
depth, which runs against itself, too: that spread is the machine's. ``--model FOLDER`` takes
another as it is, with real prompts, and drafts at the exits that are likeliest to pay. The last
command measures nothing: it prints rows of a file, by shape, dtype and batch; with ``--summary``
the table of docs/decoding.md.

``bound`` is the time of full depth over that of the layer, head and fill calls that were really
made (counted), each at the price of such a call for its number of tokens, measured in the same
run; everything else (probes, policy, sampling, bookkeeping) is what keeps ``share_of_bound`` below
1, and full depth's own bookkeeping what may lift it above. ``bound_packed`` is what perfectly
filled launches would allow (project only: there a layer call has one token per row).

On a GPU ``graphs`` says how many CUDA graphs an engine used; 0 where it launched each kernel by
itself. A clock beside one part of a step measures what was launched before it. So there is no
``fill_share`` there, and ``decision_share`` is of "3 probes, no exit" alone: the share of its time
that full depth does not take.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from shared.decode_contenders import Competitor, contenders, drafted_at, drafters, engines_of
from shared.decode_rows import DecodeRow, read_rows, show, summary, tables_of
from shared.timing import Report, StepPrices, TimedRun, counted, hugging_face, peak_mb, side_by_side
from shared.workload import SHAPES, build, exit_layer, prompts_of

from offramp.controller.policies.protocols import Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.model.gpu.graphs import GraphedLayers
from offramp.worker.model.loading import require_device
from offramp.worker.model.products import processor
from offramp.worker.model.stack import LayerStack
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import freeze_heap

NEW_TOKENS = {"reference": 64, "smollm2-135m": 32, "qwen2.5-0.5b": 16, "llama-3.2-1b": 12}
NEW_TOKENS_OF_A_FOLDER = 32


def main(
    shapes: Annotated[str, typer.Option(help="Comma-separated; 'reference' too.")] = ",".join(
        ["reference", *SHAPES]
    ),
    model: Annotated[
        str, typer.Option(help="Folder of a model instead of shapes.", show_default="none")
    ] = "",
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "float32,bfloat16",
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,8,16",
    depths: Annotated[str, typer.Option(help="Mean depths, as shares.")] = "0.75,0.5,0.25",
    repeats: Annotated[int, typer.Option(help="Interleaved; medians count.")] = 5,
    tokens: Annotated[int | None, typer.Option(help="New tokens.", show_default="by shape")] = None,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    policy: Annotated[Path | None, typer.Option(help="Bundle for the reference model.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    engines: Annotated[
        str, typer.Option(help="Beginnings of their names.", show_default="all")
    ] = "",
    quick: Annotated[bool, typer.Option(help="One shape, two batches, in < 4 minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    drafting: Annotated[bool, typer.Option(help="Static drafts, by schedule.")] = False,
    shown: Annotated[Path | None, typer.Option("--show", help="Only print this file.")] = None,
    short: Annotated[bool, typer.Option("--summary", help="Of --show, the summary.")] = False,
) -> None:
    if shown is not None:
        numbers = [int(batch) for batch in batches.split(",")]
        print_file(shown, shapes.split(","), dtypes.split(","), numbers, short)
        return
    if quick:
        shapes, dtypes, batches, depths, tokens = "smollm2-135m", "float32", "1,8", "0.25", 16
    if drafting:
        shapes = "reference"
    if model:
        shapes = model
    require_device(device)
    torch.set_num_threads(threads)
    rows: list[DecodeRow] = []
    machine = ""
    for shape in shapes.split(","):
        for dtype in dtypes.split(","):
            loaded = build(shape, getattr(torch, dtype), device)
            machine = machine or describe_machine(loaded.dtype)
            for batch in map(int, batches.split(",")):
                wanted = tuple(engines.split(","))
                new = measure(loaded, shape, batch, [float(d) for d in depths.split(",")],
                              repeats, policy, tokens, wanted, drafting)  # fmt: skip
                show(new)
                rows += new
                if json_file is not None:
                    found = {"machine": machine, "device": device_name(loaded.device),
                             "rows": [asdict(row) for row in rows]}  # fmt: skip
                    json_file.write_text(json.dumps(found, indent=1))
            del loaded
            gc.unfreeze()
            gc.collect()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def print_file(
    path: Path, shapes: list[str], dtypes: list[str], batches: list[int], is_short: bool
) -> None:
    """What was measured before: all tables of these shapes, dtypes and batches, or the summary."""
    rows = read_rows(path, shapes, dtypes, batches)
    if is_short:
        print(summary(rows))
        return
    for table in tables_of(rows):
        show(table)


def measure(
    model: Any,
    shape: str,
    batch: int,
    depths: list[float],
    repeats: int,
    policy: Path | None,
    tokens: int | None = None,
    wanted: tuple[str, ...] = ("",),
    drafting: bool = False,
) -> list[DecodeRow]:
    layers = model.config.num_hidden_layers
    hold = Schedule(holds=(exit_layer(layers),), rows=max(1, batch // 2), patience=batch)
    engines = engines_of(model, batch, drafting)
    plain = engines["lock-step"]
    prompts = prompts_of(model, shape, batch)
    new = tokens or NEW_TOKENS.get(shape, NEW_TOKENS_OF_A_FOLDER)
    todo = (
        drafters(drafted_at(model, shape), wanted)
        if drafting
        else contenders(
            batch, layers, plain.stack.vocab, depths, learned_for(shape, policy), wanted
        )
    )
    beside = todo[:1] if drafting else []

    def begun(each: Competitor) -> TimedRun:
        engine = engines.get(each.schedule or "", plain)
        if engine is plain:
            engine.set_schedule(hold if each.schedule == "cohorts" else LOCKSTEP)
        return TimedRun(engine, prompts, new, each.policy(), each.kv_mode or "project")

    def run(each: Competitor) -> list[Report]:
        """A competitor's run; before it full depth's, where both take steps in turn."""
        if each.name.startswith("HF"):
            return [hugging_face(model, prompts, new, each.name)]
        others = [begun(other) for other in beside if other is not each]
        return side_by_side(*others, begun(each))

    peaks = [peak_mb(partial(run, each), model.device) for each in todo]  # also warms all up
    freeze_heap()  # as a serving worker does
    reports: list[list[list[Report]]] = [[] for _ in todo]
    prices = StepPrices(plain, batch, exit_layer(layers))
    for _ in range(repeats):
        for each, into in zip(todo, reports, strict=True):
            into.append(run(each))
        prices.sample()
    [full] = [runs for each, runs in zip(todo, reports, strict=True) if each.name == "full depth"]
    rows = []
    for each, both, peak in zip(todo, reports, peaks, strict=True):
        baselines = [both, both] if beside else [reports[0], full]
        calls = None
        if not each.name.startswith("HF"):
            calls = calls_of(engines.get(each.schedule or "", plain), partial(begun, each), batch)
        rows.append(row_of(each, both, baselines, prices, calls,
                           (shape, str(model.dtype)[6:], batch, peak)))  # fmt: skip
        if model.device.type != "cpu":
            complete_on_gpu(rows[-1], engines.get(each.schedule or "", plain).stack)
    return rows


def learned_for(shape: str, policy: Path | None) -> Policy | None:
    if shape != "reference" or policy is None:
        return None
    return PolicyBundle.load(policy).policy()


def calls_of(
    engine: AdaptiveEngine, begun: Callable[[], TimedRun], batch: int
) -> Counter[tuple[str, int]]:
    """Count the calls of one more run, those for the prompts left out."""
    with counted(engine) as calls:
        side_by_side(begun())
    calls["head", 1] -= batch
    return calls


def complete_on_gpu(row: DecodeRow, stack: LayerStack) -> None:
    row.fill_share, is_asking = None, row.engine.startswith("3 probes")
    row.decision_share = max(0.0, 1 - row.ratio_full) if is_asking else None
    if not row.engine.startswith("HF"):
        layers = stack.run_compiled
        row.graphs = len(layers) if isinstance(layers, GraphedLayers) else 0


def row_of(
    each: Competitor,
    both: list[list[Report]],
    baselines: list[list[list[Report]]],
    prices: StepPrices,
    calls: Counter[tuple[str, int]] | None,
    where: tuple[str, str, int, float | None],
) -> DecodeRow:
    shape, dtype, batch, peak = where
    runs = [turn[-1] for turn in both]
    seconds = np.asarray([run.seconds for run in runs])
    tokens = runs[0].tokens
    # Neighbours in time are compared, so a drifting machine drifts for both.
    ratios_hf, ratios_full = (
        np.asarray([turn[0].seconds / turn[0].tokens * tokens for turn in baseline]) / seconds
        for baseline in baselines
    )
    ratio_hf, ratio_full = float(np.median(ratios_hf)), float(np.median(ratios_full))
    rate = tokens / float(np.median(seconds))
    row = DecodeRow(shape, dtype, batch, each.name, each.kv_mode, each.schedule,
              each.exit_share, None, rate, tokens / seconds.max(), tokens / seconds.min(),
              ratio_hf, ratio_full, None, None, None, None, None, None, peak)  # fmt: skip
    row.threads = torch.get_num_threads()
    row.ratio_full_low, row.ratio_full_high = float(ratios_full.min()), float(ratios_full.max())
    done = [each for run in runs for each in run.rows]
    if not done or calls is None:
        return row
    full = prices.full(batch, tokens)
    row.mean_layers = float(np.mean([layer for c in done for layer in c.exit_layers[1:]]))
    row.decision_share = sum(run.deciding_s for run in runs) / float(seconds.sum())
    row.fill_share = sum(run.filling_s for run in runs) / float(seconds.sum())
    row.accepted = _accepted(done)
    if each.name == "full depth":
        return row
    row.bound = full / prices.of(calls)
    if each.kv_mode == "project":
        row.bound_packed = _packed(prices, calls, batch, tokens)
    row.share_of_bound = row.ratio_full / row.bound
    return row


def _packed(prices: StepPrices, calls: Counter[tuple[str, int]], batch: int, tokens: int) -> float:
    depth = sum(times * count for (part, count), times in calls.items() if part == "layer")
    head = prices.of(Counter({("head", batch): 1}))
    layer = prices.of(Counter({("layer", batch): 1}))
    per_token = depth / tokens
    return (prices.layers * layer + head) / (per_token * layer + head)


def _accepted(rows: list[Sequence]) -> float | None:
    made = sum(row.drafts_made for row in rows)
    return sum(row.drafts_accepted for row in rows) / made if made else None


if __name__ == "__main__":
    typer.run(main)
