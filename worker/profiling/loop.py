"""Where the time of real decode steps goes, part by part.

Nothing is timed in isolation: an engine decodes, and a clock is put around the calls that it makes
anyway. A probe between two layers thus meets the caches that those layers leave, as it will in
service.

Shape suffixes: N rows, T tokens of each, D width.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.controller.policies.drafts import DraftRouter
from offramp.controller.policies.mlp import MlpPolicy
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine

PROCESSOR, WALL = "processor time of one thread", "wall time"
"""What the seconds are. One thread on a CPU that does all the work is charged its processor time:
what a busy machine lends to others meanwhile is no cost of the model, and on an idle one the two
are the same. Several threads, or a GPU, are charged wall time."""


PROBING = ("features", "leaving", "route")
"""Methods of a probe that read a state."""


class PartClock:
    """Seconds and calls of each part since it was last wiped.

    Args:
        device: Device of the model; a GPU is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.kind = PROCESSOR if alone else WALL
        self.now = time.thread_time if alone else time.perf_counter
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    def timed(
        self, part: str, call: Callable[..., Any], times: Callable[..., int] = lambda *_, **__: 1
    ) -> Any:
        """Wrap a function so that its time is counted as this part's.

        Args:
            part: Gets the time.
            call: Runs as before.
            times: Says of its arguments as how many calls they count.
        """

        def run(*arguments: Any, **named: Any) -> Any:
            start = self.now()
            result = call(*arguments, **named)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[part] += self.now() - start
            self.calls[part] += times(*arguments, **named)
            return result

        return run

    def wipe(self) -> None:
        """Forget all times, and begin anew."""
        self.seconds.clear()
        self.calls.clear()


@contextmanager
def clocked(engine: AdaptiveEngine) -> Iterator[PartClock]:
    """Time an engine's layers, heads, fills, and all that asking takes.

    ``build`` is what makes rows ready to be asked, at the start of a token; ``ask`` one question,
    in which ``probe`` is contained: reading the features, or, where probe and policy are one
    compiled call, that call. ``span`` is a layer over several tokens of a row.
    """
    clock, decoder = PartClock(engine.stack.device), engine.decoder
    projector: Any = decoder.projector
    stacks = [
        engine.stack,
        *(() if decoder.context.copy is None else (decoder.context.copy.stack,)),
    ]
    bench, group_rows = decoder.probes, clock.timed("build", decoder.grouper.group_rows)
    probe, fused = bench.probe, bench.fused_probe
    calls = {
        **{(s, "run_layers"): _by_width(clock, s.run_layers) for s in stacks},
        **{(s, "logits"): clock.timed("head", s.logits) for s in stacks},
        (projector, "fill"): clock.timed("fill", projector.fill),
        (bench, "probe"): lambda *rest: _watched(probe(*rest), PROBING, "probe", clock),
        (bench, "fused_probe"): lambda *rest: _watched(fused(*rest), PROBING, "probe", clock),
        (decoder.grouper, "group_rows"): lambda *rest: [
            _watched(asked, ("ask",), "ask", clock) for asked in group_rows(*rest)
        ],
    }
    with ExitStack() as restored:
        for (owner, name), call in calls.items():
            setattr(owner, name, call)
            restored.callback(delattr, owner, name)
        yield clock


def _by_width(clock: PartClock, run_layers: Callable[..., Tensor]) -> Callable[..., Tensor]:
    one, several = (clock.timed(part, run_layers, _layers_run) for part in ("layer", "span"))

    def run(first: int, last: int, x_NTD: Tensor, *rest: Any) -> Tensor:
        timed: Callable[..., Tensor] = one if x_NTD.shape[1] == 1 else several
        return timed(first, last, x_NTD, *rest)

    return run


def _layers_run(first: int, last: int, *_: Any) -> int:
    return last - first


def _watched(made: Any, methods: Sequence[str], part: str, clock: PartClock) -> Any:
    """An object with its methods timed, still of its own type: the engine looks at types."""
    for name in methods:
        if hasattr(made, name):
            setattr(made, name, clock.timed(part, getattr(made, name)))
    return made


SILENT, STAY = -2, -1
"""What a policy does in a step: it has no exits; it is asked at each, and all rows stay."""


class ScriptedPolicy:
    """Makes a policy of the published kind do as it is told, at the price of its own decisions.

    Args:
        policy: Its exits, and its threshold if it is a gate, are changed from step to step.

    Attributes:
        exits: At which it is asked.
    """

    def __init__(self, policy: MlpPolicy | DraftRouter) -> None:
        self.policy = policy
        self.exits = policy.exits

    def begin(self, act: int) -> None:
        """Say what it does in the next step: ``SILENT``, ``STAY``, or leave at exit ``act``."""
        self.policy.exits = () if act == SILENT else self.exits
        if isinstance(self.policy, DraftRouter):
            return  # where it is asked, its nets decide
        self.policy.threshold = math.inf
        if act >= 0:
            self.policy.exits = self.exits[act : act + 1]
            self.policy.threshold = -math.inf


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one engine step.

    Attributes:
        whole_s: All of it.
        parts_s: By part: layer, span, head, fill, build, ask (with the probe) and probe, each
            summed over its calls.
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
        parts_s = self.parts_s.items()
        return self.whole_s - sum(seconds for part, seconds in parts_s if part != "probe")


def decode_steps(
    engine: AdaptiveEngine,
    clock: PartClock,
    script: ScriptedPolicy,
    prompts: list[list[int]],
    acts: Sequence[int],
    kv_mode: KVMode = "project",
) -> list[Step]:
    """Read prompts, then decode some steps of all of them together, each timed.

    Steps that still read a prompt are not timed; rows whose prompt was read first decode in them,
    so that the rows' positions differ, as they do in service.

    Args:
        engine: Idle, in lock-step.
        clock: Around the engine's parts.
        script: Policy of all rows, told what to do.
        prompts: One per row, all within the engine's slots.
        acts: What the policy does in each step.
        kv_mode: In ``verify``, a token that leaves is a draft, and the next one that goes to the
            end verifies all drafts.
    """
    sampling = SamplingParams(max_tokens=most_tokens(len(prompts), len(acts)), ignore_eos=True)
    # Without exits, for project goes with no adapter layer that has an exit before it; in verify
    # with them, for a row that is seated without any on the copy never drafts there.
    script.begin(STAY if kv_mode == "verify" else SILENT)
    requests = [engine.submit(p, sampling, script.policy, kv_mode=kv_mode) for p in prompts]
    while engine.is_prefilling:
        engine.step()
    script.begin(SILENT)
    engine.step()  # which verifies what rows have drafted that were seated first
    steps = []
    for act in acts:
        script.begin(act)
        clock.wipe()
        start = clock.now()
        engine.step()
        whole_s = clock.now() - start
        steps.append(Step(whole_s, dict(clock.seconds), dict(clock.calls)))
    for request in requests:
        engine.cancel(request.id)
    return steps


def most_tokens(rows: int, steps: int) -> int:
    """Tokens that a row of ``decode_steps`` may decode."""
    return rows + steps + 2
