"""Is our baseline honest? Full depth in this engine against Hugging Face's own generate.

Both decode the same prompts greedily with a KV cache, interleaved, in one process; the ratio is
tokens/s of this engine with exits off over tokens/s of ``model.generate``. With ``--policy`` the
engine also runs a trained bundle, so that its gain is seen against both.

    python benchmarks/full_depth.py --json full_depth.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from offramp.controller.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.actor import WorkerSpec, load_engine
from offramp.worker.profile import describe_machine


@dataclass(frozen=True)
class Row:
    batch: int
    engine: str
    tokens_per_s: float
    low: float
    high: float
    ratio_hf: float


def main(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    policy: Annotated[Path | None, typer.Option(help="Bundle folder to run as well.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,4,8",
    tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 64,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians count.")] = 7,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    engine = load_engine(WorkerSpec(model=model, dtype=dtype, threads=threads))
    bundle = None if policy is None else PolicyBundle.load(policy)
    rows = []
    for batch in map(int, batches.split(",")):
        runs = runners(engine, bundle, batch, prompt_tokens, tokens)
        rows += measure(runs, batch, batch * tokens, repeats)
    machine = describe_machine(engine.stack.dtype)
    table = Table("batch", "engine", "tokens/s", "spread", "ratio to HF", title=machine)
    for row in rows:
        spread = f"{row.low:.1f}-{row.high:.1f}"
        table.add_row(
            str(row.batch), row.engine, f"{row.tokens_per_s:.1f}", spread, f"{row.ratio_hf:.3f}"
        )
    Console().print(table)
    if json_file is not None:
        settings = {"model": model, "tokens": tokens, "prompt_tokens": prompt_tokens}
        report = {"machine": machine, **settings, "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(report, indent=1))


def runners(
    engine: AdaptiveEngine,
    bundle: PolicyBundle | None,
    batch: int,
    prompt_tokens: int,
    tokens: int,
) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(batch)
    prompts = rng.integers(1, engine.stack.vocab, size=(batch, prompt_tokens)).tolist()
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    ids = torch.tensor(prompts)

    def hugging_face() -> object:
        # min_new_tokens keeps the end-of-sequence token away, so that both decode as many.
        return engine.stack.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )

    runs: dict[str, Callable[[], object]] = {
        "HF generate": hugging_face,
        "full depth": lambda: engine.generate(prompts, sampling),
    }
    if bundle is not None:
        learned = bundle.policy()
        runs["policy"] = lambda: engine.generate(prompts, sampling, learned)
    return runs


def measure(
    runs: dict[str, Callable[[], object]], batch: int, tokens: int, repeats: int
) -> list[Row]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    baseline = np.asarray(seconds["HF generate"])
    return [
        Row(
            batch=batch,
            engine=name,
            tokens_per_s=tokens / median(values),
            low=tokens / max(values),
            high=tokens / min(values),
            # Neighbours in time are compared, so a drifting machine drifts for both.
            ratio_hf=float(np.median(baseline / np.asarray(values))),
        )
        for name, values in seconds.items()
    ]


if __name__ == "__main__":
    typer.run(main)
