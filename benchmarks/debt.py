"""What do exits cost later? Agreement under projected keys and values, by debt; features of jumps.

Documents are followed (teacher-forced) with the cache that random exits leave behind. For every
token the debt that it reads is known (moving average of the layers skipped below its own exit), and
whether that exit agrees with full depth under an exact cache, as recorded. The loss per unit of
debt is fitted by least squares, on-policy = recorded · (1 − c · debt^p), for the p of a grid that
leaves the smallest squared error; the interval of c is bootstrapped over documents. The two are
``debt_loss`` and ``debt_power`` of ``offramp/SequenceExit-v0``.

The same documents show how well features of jumps are recomputed from a recording of every exit.

    python benchmarks/debt.py --json debt.json

With a map of the fill, what filling destroys is measured instead, plainly and through the map, by
exit and by policy (``shared/fills.py``):

    offramp tune --kv --out runs/kv --exits 3,6,9
    python benchmarks/debt.py --kv runs/kv --policies runs/demo/policies/chosen --json fills.json
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from shared.fills import by_exit, by_policy, engines_of

from offramp.agents.recording.corpus import load_corpus, tokenize, window
from offramp.controller.features import CANDIDATES_V1, BoolArray, FloatArray, IntArray
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.traces import TraceHeader
from offramp.envs import TokenTraces
from offramp.envs.traces.pairs import COMPARED, PairFeatures
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.follow import follow
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.recording.recorder import record_document
from offramp.worker.spec import WorkerSpec, load_engine

PROMPT = 32
"""Tokens of each document read at full depth first."""

RESAMPLES = 2000

POWERS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)

EDGES = (1e-9, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0)
"""Bins of debt in the table; tokens that read none are left out."""


@dataclass
class RandomExits:
    """Leaves at each exit with a chance that is drawn anew every ``spell`` tokens."""

    exits: tuple[int, ...]
    rng: np.random.Generator
    spell: int = 24
    schema: None = None
    candidates_VK: IntArray | None = None
    chance: float = 0.0
    asked: int = field(default=0)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        if self.asked % self.spell == 0:
            self.chance = self.rng.uniform(0, 1) ** 2
        self.asked += 1
        return self.rng.random(len(features_NF)) < self.chance


@dataclass(frozen=True)
class Token:
    document: int
    debt: float
    exit_index: int
    recorded: float
    found: float


def main(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    exits: Annotated[str, typer.Option(help="Layers to leave after.")] = "3,6,9",
    documents: Annotated[int, typer.Option(help="Training documents to follow.")] = 60,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the exits and the bootstrap.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    quick: Annotated[bool, typer.Option(help="Eight documents, under four minutes.")] = False,
    kv: Annotated[Path | None, typer.Option(help="Map of the fill to measure.")] = None,
    policies: Annotated[str, typer.Option(help="Bundles to follow with it, by comma.")] = "",
    batches: Annotated[str, typer.Option(help="Rows that they are followed in.")] = "1,8",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    if kv is not None:
        texts = texts_of(model, 8 if quick else documents, tokens, "validation")
        bundles = [Path(each) for each in policies.split(",") if each]
        rows = fills(model, dtype, kv, texts, bundles, [int(each) for each in batches.split(",")])
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=1))
        return
    engine = load_engine(WorkerSpec(model=model, threads=1, slots=1))
    layers = tuple(map(int, exits.split(",")))
    texts = texts_of(model, 8 if quick else documents, tokens + 1)
    table_VK = successor_table(texts, engine.stack.vocab, 64)
    rng = np.random.default_rng(seed)
    seen = [
        token
        for index, text in enumerate(texts)
        for token in follow_one(engine, layers, index, text, table_VK, rng)
    ]
    fit = fitted(seen, rng)
    pairs = jumps(engine, layers, texts[: 4 if quick else 12], table_VK)
    machine = describe_machine(engine.stack.dtype)
    show(machine, fit, pairs)
    if json_file is not None:
        content = {"machine": machine, "exits": layers, "fit": fit, "jumps": pairs}
        json_file.write_text(json.dumps(content, indent=1))


def fills(
    model: str, dtype: str, kv: Path, texts: list[list[int]], bundles: list[Path], rows: list[int]
) -> dict[str, Any]:
    """Both tables of ``shared/fills.py``, printed as they come."""
    console = Console(width=140)
    found: dict[str, Any] = {"by_exit": [], "by_policy": []}
    for slots in rows:
        engines = engines_of(model, dtype, kv, slots)
        if slots == rows[0]:
            found["machine"] = describe_machine(engines["defer"].stack.dtype)
            found["by_exit"] = by_exit(engines["defer"], texts, seed=0)
            console.print(*found["by_exit"], sep="\n")
        for row in by_policy(engines, texts, bundles, repeats=3):
            found["by_policy"].append(row)
            console.print(row)
    return found


def texts_of(model: str, count: int, length: int, split: str = "train") -> list[list[int]]:
    """Windows of a split's documents of the standard library."""
    limit = (2 if split == "train" else 12) * count + 20
    documents = [doc for doc in load_corpus(None, limit=limit) if doc.split == split]
    windows = [window(doc, ids, length) for doc, ids in tokenize(model, documents)]
    return [ids for ids in windows if len(ids) == length][:count]


def follow_one(
    engine: AdaptiveEngine,
    exits: tuple[int, ...],
    index: int,
    text: list[int],
    table_VK: IntArray,
    rng: np.random.Generator,
) -> list[Token]:
    chunk = record_document(engine.stack, "d", text, exits, table_VK)
    [full], _ = follow(engine, [text], PROMPT, NeverExit())
    [ours], _ = follow(engine, [text], PROMPT, RandomExits(exits, rng))
    layers = engine.stack.layers
    columns = [exits.index(each) if each < layers else len(exits) for each in ours.exit_layers]
    depth_E1 = np.array([*exits, layers]) / layers
    debt_E1, out = np.zeros(len(depth_E1)), []
    for step, column in enumerate(columns):
        at = PROMPT + step
        found = float(ours.emitted[step] == full.emitted[step])
        recorded = 1.0
        if column < len(exits):
            recorded = float(chunk.exit_token_TE[at, column] == full.emitted[step])
        out.append(Token(index, float(debt_E1[column]), column, recorded, found))
        debt_E1 = 0.9 * debt_E1 + 0.1 * np.maximum(0, depth_E1 - depth_E1[column])
    return out


def fitted(seen: list[Token], rng: np.random.Generator) -> dict[str, Any]:
    """The slopes with their intervals, and what there is by debt and by exit."""
    columns = [
        [getattr(token, name) for token in seen]
        for name in ("document", "debt", "recorded", "found", "exit_index")
    ]
    document_N, debt_N, recorded_N, found_N, exit_N = map(np.array, columns)
    draws = rng.integers(document_N.max() + 1, size=(RESAMPLES, document_N.max() + 1))
    powers = [slope(document_N, debt_N, recorded_N, found_N, p, draws) for p in POWERS]
    bins = [
        mean_of(debt_N, recorded_N, found_N, (debt_N >= low) & (debt_N < high))
        for low, high in itertools.pairwise(EDGES)
    ]
    exits = {int(e): mean_of(debt_N, recorded_N, found_N, exit_N == e) for e in np.unique(exit_N)}
    best = min(powers, key=lambda each: each["squared_error"])
    sizes = {"documents": int(document_N.max() + 1), "tokens": len(seen)}
    return {**best, **sizes, "powers": powers, "by_debt": bins, "by_exit": exits}


def slope(
    document_N: NDArray[Any],
    debt_N: NDArray[Any],
    recorded_N: NDArray[Any],
    found_N: NDArray[Any],
    power: float,
    draws: NDArray[Any],
) -> dict[str, float]:
    """Least squares of recorded − found = c · recorded · debt^power."""
    x_N, y_N = recorded_N * debt_N**power, recorded_N - found_N
    above_D, below_D = np.bincount(document_N, x_N * y_N), np.bincount(document_N, x_N * x_N)
    low, high = np.percentile(above_D[draws].sum(1) / below_D[draws].sum(1), [2.5, 97.5])
    loss = float(above_D.sum() / below_D.sum())
    return {
        "debt_power": power,
        "debt_loss": loss,
        "low": float(low),
        "high": float(high),
        "squared_error": float(((y_N - loss * x_N) ** 2).sum()),
    }


def mean_of(
    debt_N: NDArray[Any], recorded_N: NDArray[Any], found_N: NDArray[Any], inside_N: NDArray[Any]
) -> dict[str, float]:
    tokens = int(inside_N.sum())
    columns = {"debt": debt_N, "recorded": recorded_N, "found": found_N}
    means = {name: float(each[inside_N].sum() / max(1, tokens)) for name, each in columns.items()}
    return {"tokens": tokens, **means}


def jumps(
    engine: AdaptiveEngine, exits: tuple[int, ...], texts: list[list[int]], table_VK: IntArray
) -> list[dict[str, Any]]:
    """Recomputed features of each jump against those of a recording of these exits only."""
    whole = PairFeatures(recorded(engine, exits, texts, table_VK))
    rows = []
    for before, here in itertools.combinations(range(-1, len(exits)), 2):
        if here - before < 2:
            continue
        asked = tuple(exits[e] for e in (before, here) if e >= 0)
        real_NF = recorded(engine, asked, texts, table_VK).features_NEF[:, -1]
        found_NQ = whole.values_NPEQ[:, before + 1, here]
        for q, name in enumerate(COMPARED):
            real_N = real_NF[:, CANDIDATES_V1.index(name)]
            error_N = np.abs(found_NQ[:, q] - real_N)
            rows.append(
                {
                    "before": exits[before] if before >= 0 else 0,
                    "here": exits[here],
                    "column": name,
                    "mean_error": float(error_N.mean()),
                    "worst_error": float(error_N.max()),
                    "real_mean": float(real_N.mean()),
                    "real_std": float(real_N.std()),
                    "bias": float((found_NQ[:, q] - real_N).mean()),
                }
            )
    return rows


def recorded(
    engine: AdaptiveEngine, exits: tuple[int, ...], texts: list[list[int]], table_VK: IntArray
) -> TokenTraces:
    stack = engine.stack
    header = TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=exits, layers=stack.layers)
    chunks = [
        record_document(stack, str(index), text, exits, table_VK)
        for index, text in enumerate(texts)
    ]
    return TokenTraces.from_chunks(header, chunks)


def show(machine: str, fit: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
    console = Console(width=100)
    console.print(f"{fit['documents']} documents, {fit['tokens']} tokens; {machine}")
    table = Table("power", "loss", "low", "high", "squared error")
    for row in fit["powers"]:
        table.add_row(*(f"{value:.4f}" for value in row.values()))
    console.print(table)
    loss, power = fit["debt_loss"], fit["debt_power"]
    table = Table("debt", "tokens", "recorded", "on-policy", "model")
    for row in fit["by_debt"]:
        model = row["recorded"] * (1 - loss * row["debt"] ** power)
        shares = [f"{each:.3f}" for each in (row["recorded"], row["found"], model)]
        table.add_row(f"{row['debt']:.3f}", str(row["tokens"]), *shares)
    console.print(table)
    console.print(fit["by_exit"])
    table = Table("from", "to", "column", "mean error", "worst", "bias", "real mean", "real std")
    for row in pairs:
        names = ("mean_error", "worst_error", "bias", "real_mean", "real_std")
        numbers = [f"{row[name]:.4f}" for name in names]
        table.add_row(str(row["before"]), str(row["here"]), row["column"], *numbers)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
