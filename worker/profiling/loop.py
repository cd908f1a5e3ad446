"""Where the time of real decode steps goes, part by part.

Nothing is timed in isolation: an engine decodes, and a clock is put around the calls that it makes
anyway. A probe between two layers thus meets the caches that those layers leave, as it will in
service.

Shape suffixes: N rows, D width, F features.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.mlp import MlpPolicy
from offramp.worker.attention import decode_window, ragged_window
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.sampling import SamplingParams

PROCESSOR, WALL = "processor time of one thread", "wall time"
"""What the seconds are. One thread on a CPU that does all the work is charged its processor time:
what a busy machine lends to others meanwhile is no cost of the model, and on an idle one the two
are the same. Several threads, or a GPU, are charged wall time."""


class Clock:
    """Seconds and calls of each part since it was last wiped.

    Args:
        device: Of the model; a GPU is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.kind = PROCESSOR if alone else WALL
        self.now = time.thread_time if alone else time.perf_counter
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Any:
        """The same function, timed as this part."""

        def run(*arguments: Any, **named: Any) -> Any:
            start = self.now()
            result = call(*arguments, **named)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[part] += self.now() - start
            self.calls[part] += 1
            return result

        return run

    def wipe(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.calls.clear()


class TimedProbe:
    """A probe whose ``features`` are timed."""

    def __init__(self, probe: Any, clock: Clock) -> None:
        self._probe = probe
        self.features = clock.timed("probe", probe.features)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._probe, name)


@contextmanager
def clocked(engine: AdaptiveEngine) -> Iterator[Clock]:
    """Time an engine's layers, heads, probes, decisions and fills."""
    clock = Clock(engine.stack.device)
    bench: Any = engine.decoder.bench
    projector: Any = engine.decoder.projector
    build = clock.timed("build", bench.probe)
    calls = {
        (engine.stack, "run_layer"): clock.timed("layer", engine.stack.run_layer),
        (engine.stack, "logits"): clock.timed("head", engine.stack.logits),
        (engine.decoder.guard, "decide"): clock.timed("policy", engine.decoder.guard.decide),
        (engine.decoder.projector, "project"): clock.timed("fill", projector.project),
        (engine.kv, "fill"): clock.timed("fill", engine.kv.fill),
        (bench, "probe"): lambda *rest: TimedProbe(build(*rest), clock),
    }
    with ExitStack() as restored:
        for (owner, name), call in calls.items():
            setattr(owner, name, call)
            restored.callback(delattr, owner, name)
        yield clock


SILENT, STAY = -2, -1
"""What a policy does in a step: it has no exits; it is asked at each, and all rows stay."""


class ScriptedPolicy:
    """Decides as it is told, after paying for a decision.

    Args:
        inner: A policy of the size that is published; its opinion is not heard.

    Attributes:
        act: ``SILENT``, ``STAY``, or the index of the exit at which all rows leave.
    """

    def __init__(self, inner: MlpPolicy) -> None:
        self.schema = inner.schema
        self.candidates_VK = inner.candidates_VK
        self.act = STAY
        self._inner = inner
        self._asked = 0

    @property
    def exits(self) -> tuple[int, ...]:
        """Those of the inner policy, unless it is silent."""
        return () if self.act == SILENT else self._inner.exits

    def begin(self, act: int) -> None:
        """Say what it does in the next step."""
        self.act = act
        self._asked = 0

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """All rows, or none."""
        self._inner.leave(features_NF)
        leaves = self._asked == self.act
        self._asked += 1
        return np.full(len(features_NF), leaves, np.bool_)


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one engine step.

    Attributes:
        whole_s: All of it.
        parts_s: By part: layer, head, build, probe, policy, fill; summed over its calls.
        calls: Calls of each.
    """

    whole_s: float
    parts_s: Mapping[str, float]
    calls: Mapping[str, int]

    def each(self, part: str) -> float:
        """Seconds of one call."""
        return self.parts_s[part] / self.calls[part]

    @property
    def rest_s(self) -> float:
        """What none of the parts took."""
        return self.whole_s - sum(self.parts_s.values())


def decode_steps(
    engine: AdaptiveEngine,
    clock: Clock,
    policy: ScriptedPolicy,
    prompts: list[list[int]],
    script: Sequence[int],
) -> list[Step]:
    """Read prompts, then decode some steps of all of them together, each timed.

    Args:
        engine: Idle; reads all the prompts in its first step, which is not timed.
        clock: Around the engine's parts.
        policy: Of all rows.
        prompts: One per row, all within the engine's slots.
        script: What the policy does in each step.
    """
    sampling = SamplingParams(max_tokens=len(script) + 1, ignore_eos=True)
    for prompt in prompts:
        engine.submit(prompt, sampling, policy)
    engine.step()
    steps = []
    for act in script:
        policy.begin(act)
        clock.wipe()
        start = clock.now()
        engine.step()
        whole_s = clock.now() - start
        steps.append(Step(whole_s, dict(clock.seconds), dict(clock.calls)))
    assert engine.load == (0, 0)
    return steps


def span_pass(engine: AdaptiveEngine, clock: Clock, context: int, tokens: int) -> dict[str, float]:
    """Seconds of a layer and of the head over several tokens of one row, all layers in turn."""
    stack = engine.stack
    engine.kv.reserve(context + tokens)
    positions_1T = torch.arange(context, context + tokens, device=stack.device)[None]
    x_1TD = stack.embed(positions_1T % stack.vocab, positions_1T)
    rotary = stack.rotary(x_1TD, positions_1T)
    last = context + tokens - 1
    window = (
        decode_window([0], [last], stack.heads_per_key, x_1TD)
        if tokens == 1
        else ragged_window([0], [last], [tokens], stack.heads_per_key, x_1TD)
    )
    engine.kv.open(window)
    clock.wipe()
    for index in range(stack.layers):
        x_1TD = stack.run_layer(index, x_1TD, rotary, window, engine.kv)
    stack.logits(x_1TD[0])
    return {"layer": clock.seconds["layer"] / stack.layers, "head": clock.seconds["head"]}
