"""How the decoding benchmarks time a run, and price the calls that it made."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from offramp.controller.policies.protocols import Policy
from offramp.worker import AdaptiveEngine, KVMode, SamplingParams
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.model.attention import decode_window, ragged_window
from shared.workload import PROMPT_TOKENS


@dataclass
class Report:
    """What one run of a contender gave; ``emitted`` are the new tokens of each prompt."""

    seconds: float
    tokens: int
    rows: list[Sequence] = field(default_factory=list)
    deciding_s: float = 0.0
    filling_s: float = 0.0
    emitted: list[list[int]] = field(default_factory=list)


def now(device: torch.device) -> float:
    """Seconds on the clock, once a GPU has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedRun:
    """Prompts that an engine decodes, step by step on the clock.

    They are read, and the first tokens emitted, before it starts. Above temperature 0 a prompt has
    a seed of its own, the same for whoever decodes it.
    """

    def __init__(
        self,
        engine: AdaptiveEngine,
        prompts: list[list[int]],
        new: int,
        policy: Policy,
        kv_mode: KVMode = "project",
        temperature: float = 0.0,
    ) -> None:
        sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=temperature)
        self._asked = [
            engine.submit(prompt, replace(sampling, seed=sum(prompt)), policy, kv_mode=kv_mode)
            for prompt in prompts
        ]
        self._engine, self._finished = engine, dict[str, Sequence]()
        engine.step(self._finished)
        spent = engine.decoder.overhead
        self._before = (spent.deciding_s, spent.filling_s)
        self._seconds, self._tokens = 0.0, (new - 1) * len(prompts)

    @property
    def is_over(self) -> bool:
        """Whether the engine has nothing left to do."""
        return self._engine.load == (0, 0)

    def step(self) -> None:
        """Let the engine take a step, if there is one."""
        if not self.is_over:
            start = now(self._engine.stack.device)
            self._engine.step(self._finished)
            self._seconds += now(self._engine.stack.device) - start

    def report(self) -> Report:
        """What came of it."""
        spent = self._engine.decoder.overhead
        return Report(self._seconds, self._tokens, list(self._finished.values()),
                      spent.deciding_s - self._before[0], spent.filling_s - self._before[1],
                      [self._finished[request.id].emitted for request in self._asked])  # fmt: skip


def side_by_side(*runs: TimedRun) -> list[Report]:
    """Let runs of different engines take a step each in turn: a busy machine is busy for all."""
    while not all(run.is_over for run in runs):
        for run in runs:
            run.step()
    return [run.report() for run in runs]


def ours(*what: Any, **how: Any) -> Report:
    """Time a run; takes what ``TimedRun`` takes."""
    return side_by_side(TimedRun(*what, **how))[0]


class TokenClock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Starts when the first tokens are there."""

    def __init__(self) -> None:
        self.start = 0.0
        self.length = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if not self.start:
            self.start, self.length = now(input_ids.device), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def hugging_face(
    model: Any,
    prompts: list[list[int]],
    new: int,
    name: str,
    temperature: float = 0.0,
    **options: Any,
) -> Report:
    """Its own loop, with more options of ``generate`` if any; timed from the first token on.

    ``static`` in the name asks for a static cache, compiled on a GPU.
    """
    ids = torch.tensor(prompts, device=model.device)
    options |= {"max_new_tokens": new, "min_new_tokens": new, "do_sample": temperature > 0}
    if temperature > 0:
        torch.manual_seed(sum(prompts[0]))
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if "static" in name:
        options["cache_implementation"] = "static"
    if "=" in name:
        options["assistant_early_exit"] = int(name.partition("=")[2])
    clock = TokenClock()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0,
                         stopping_criteria=StoppingCriteriaList([clock]), **options)  # fmt: skip
    seconds = now(model.device) - clock.start
    return Report(seconds, (out.shape[1] - clock.length) * len(prompts),
                  emitted=out[:, ids.shape[1] :].tolist())  # fmt: skip


class StepPrices:
    """Measured seconds of one layer, head and fill call, by the tokens in it; sampled in turn."""

    def __init__(self, engine: AdaptiveEngine, batch: int, at: int) -> None:
        self.engine = engine
        self.layers = engine.stack.layers
        rows = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 32) if n < batch]
        self.counts = [*rows, *(batch * columns for columns in (1, 2, 3, 4, 6, 9))]
        self.exit = at
        self.samples: dict[tuple[str, int], list[float]] = {}

    def sample(self) -> None:
        for tokens in self.counts:
            self._time(tokens)

    def of(self, calls: Counter[tuple[str, int]]) -> float:
        """Seconds of all counted calls."""
        return sum(times * self._price(*call) for call, times in calls.items())

    def full(self, batch: int, tokens: int) -> float:
        """Seconds of ``tokens`` tokens at full depth in full batches."""
        step = Counter({("layer", batch): self.layers, ("head", batch): 1})
        return self.of(step) * tokens / batch

    def _price(self, part: str, tokens: int) -> float:
        table = [median(self.samples[part, count]) for count in self.counts]
        return float(np.interp(tokens, self.counts, table))

    @torch.inference_mode()
    def _time(self, tokens: int) -> None:
        stack, kv = self.engine.stack, self.engine.kv
        rows = min(tokens, kv.slots)
        columns = tokens // rows
        at = PROMPT_TOKENS + 8
        x = torch.randn(rows, columns, stack.width).to(stack.device, stack.dtype)
        rotary = stack.rotary(x, torch.full((rows, columns), at, device=stack.device))
        window = (
            decode_window(range(rows), [at] * rows, stack.heads_per_key, x)
            if columns == 1
            else ragged_window(range(rows), [at] * rows, [columns] * rows, stack.heads_per_key, x)
        )
        kv.open(window)
        states = x.flatten(0, 1)
        places = np.array(([n // columns for n in range(tokens)], [at] * tokens), np.int64)
        projector = self.engine.decoder.projector
        assert projector is not None
        for _ in range(2):
            times = [now(stack.device)]
            y = stack.run_layers(0, stack.layers, x, rotary, window, kv)
            times.append(now(stack.device))
            stack.logits(y.flatten(0, 1))
            times.append(now(stack.device))
            projector.fill(states, self.exit, places, kv)
            times.append(now(stack.device))
            layers, head, fill = np.diff(times)
            for part, seconds in (("layer", layers / self.layers), ("head", head), ("fill", fill)):
                self.samples.setdefault((part, tokens), []).append(float(seconds))


@contextlib.contextmanager
def counted(engine: AdaptiveEngine) -> Iterator[Counter[tuple[str, int]]]:
    """Counts decode calls (not the prompt's) by the tokens in them."""
    calls: Counter[tuple[str, int]] = Counter()

    def count(part: str) -> Any:
        def hook(_: Any, _inputs: Any, output: Any) -> None:
            tokens = output.numel() // output.shape[-1]
            if output.dim() == 2 or output.shape[1] < PROMPT_TOKENS:
                calls[part, tokens] += 1

        return hook

    blocks = [block.register_forward_hook(count("layer")) for block in engine.stack.blocks]
    handles = [*blocks, engine.stack.head.register_forward_hook(count("head"))]
    projector = engine.decoder.projector
    assert projector is not None
    fill = projector.fill

    def counting(x_ND: torch.Tensor, *rest: Any) -> Any:
        calls["fill", len(x_ND)] += 1
        return fill(x_ND, *rest)

    projector.fill = counting  # type: ignore[method-assign,assignment]
    yield calls
    projector.fill = fill  # type: ignore[method-assign]
    for handle in handles:
        handle.remove()


def peak_mb(action: Callable[[], object], device: torch.device) -> float | None:
    """Highest memory of an action in MiB: a GPU's that torch took, else what this process holds.

    None if it is not known.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        action()
        return None
    action()
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024
