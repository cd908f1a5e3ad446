"""Reads prompts under policies, and measures what they save and what follows loses by it.

Shape suffixes: N prompts (or tokens that a policy is asked about), P policies, F feature columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.agents.evaluation.lines import edit_similarity
from offramp.agents.prompting.prompt_config import PromptLessonConfig
from offramp.agents.prompting.read_tasks import LONGEST, ReadTask, Stretch
from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import PROMPT_V1, BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, NeverExit
from offramp.worker.decoding.prompting.prompt_exits import PromptExits
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.follow import nats_per_token, submit_scored

Floats = NDArray[np.float64]

SLOTS = 4
"""Prompts that are read side by side where nothing is timed."""

FIRST_TOKEN = SamplingParams(max_tokens=1)
ONE_LINE = SamplingParams(max_tokens=LONGEST, stop=("\n",))


@dataclass(frozen=True, slots=True)
class Readings:
    """What came of some prompts under one policy.

    Attributes:
        losses_N: Loss of what follows each, nats per token.
        calls_N: Layers run, summed over its tokens, as a share of those in full.
    """

    losses_N: Floats
    calls_N: Floats


@dataclass(frozen=True, slots=True)
class Completions:
    """Lines that were completed behind prompts read one way, and how like the document's own."""

    texts: list[str]
    similarities_N: Floats


class CurrentPolicy:
    """Whichever policy for prompts is measured now, as the one policy of an engine.

    Attributes:
        current: Policy that is asked.
    """

    def __init__(self) -> None:
        self.current: ExitPolicy = NeverExit()

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers after which it is asked."""
        return self.current.exits

    @property
    def schema(self) -> FeatureSchema | None:
        """What it reads."""
        return self.current.schema

    @property
    def candidates_VK(self) -> IntArray | None:
        """Nothing: no head is touched in a prompt."""
        return self.current.candidates_VK

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Tokens that leave, [N]."""
        return self.current.leave(features_NF)


class StateWatcher:
    """A policy for prompts that leaves nowhere, and keeps what it is shown.

    Attributes:
        exits, schema, candidates_VK: What an ``ExitPolicy`` declares under these names.
        rows: PROMPT_V1 of each chunk's tokens after each exit, in the order of asking.
    """

    schema, candidates_VK = PROMPT_V1, None

    def __init__(self, exits: tuple[int, ...]) -> None:
        self.exits = exits
        self.rows: list[FloatArray] = []

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Nobody, [N]."""
        self.rows.append(features_NF.copy())
        return np.zeros(len(features_NF), np.bool_)


def score(engine: AdaptiveEngine, stretches: Sequence[Stretch]) -> Readings:
    """Read each prompt the engine's way, and score what follows, fed at full depth.

    Raises:
        PolicyFaultError: the engine's policy for prompts failed on one.
    """
    requests = [submit_scored(engine, each.prompt, each.following) for each in stretches]
    done: dict[str, Any] = {}
    while len(done) < len(requests):
        engine.step(done)
    rows = [done[request.id] for request in requests]
    if any(row.prompt_failed for row in rows):
        raise PolicyFaultError("it failed on a prompt")
    calls = [row.prompt_calls / len(row.request.prompt) for row in rows]
    return Readings(
        losses_N=np.array([nats_per_token(row) for row in rows]),
        calls_N=np.array(calls) / engine.stack.layers,
    )


def complete_tasks(engine: AdaptiveEngine, tasks: Sequence[ReadTask]) -> Completions:
    """Complete each task's line at full depth, behind its prompt read the engine's way."""
    prompts = [list(task.line.prompt) for task in tasks]
    texts = [each.text.strip() for each in engine.generate(prompts, ONE_LINE, NeverExit())]
    scores = [edit_similarity(t, task.line.target) for t, task in zip(texts, tasks, strict=True)]
    return Completions(texts, np.array(scores) / 100)


class PromptMeter:
    """Two engines over one model's weights: one reads prompts in full, one under any policy.

    Args:
        engine: The model, idle; its adapters are what every policy is measured with.
        config: Settings of the lesson.
    """

    def __init__(self, engine: AdaptiveEngine, config: PromptLessonConfig) -> None:
        self._layers, self._kept = engine.stack.layers, config.keep_first + config.keep_last
        self._policy = CurrentPolicy()
        translators = engine.config.translators
        prompts = PromptExits(
            policy=self._policy, keep_first=config.keep_first, keep_last=config.keep_last
        )
        ways = (
            EngineConfig(translators=translators),
            EngineConfig(translators=translators, prefill="exits", prompts=prompts),
        )
        self._full, self._early = (
            AdaptiveEngine(engine.model, engine.tokenizer, slots=SLOTS, config=way) for way in ways
        )

    def read(self, stretches: Sequence[Stretch], policy: ExitPolicy) -> Readings:
        """Score what follows prompts read with a policy.

        Raises:
            PolicyFaultError: the policy failed on one.
        """
        return score(self._under(policy), stretches)

    def complete(self, tasks: Sequence[ReadTask], policy: ExitPolicy) -> Completions:
        """Complete lines behind prompts read with a policy."""
        return complete_tasks(self._under(policy), tasks)

    def times(
        self,
        stretches: Sequence[Stretch],
        policies: Sequence[ExitPolicy],
        on_prompt: Callable[[int, int], None] = lambda *_: None,
    ) -> tuple[Floats, Floats]:
        """Seconds to the first token, prompt by prompt, all policies in turn.

        Everything that a policy costs is in: its probe, its decisions, the fill.

        Args:
            stretches: Prompts; what follows is not read.
            policies: Those whose prompts are timed, beside full depth.
            on_prompt: Told (prompts done, in all).

        Returns:
            Processor time and wall time, each [P + 1, N], full depth first: the mean of the reading
            before the policies' and the one after.
        """
        self._warm(stretches[0])
        taken = []
        for done, each in enumerate(stretches, 1):
            rounds = [_taken(self._full, each)]
            rounds += [_taken(self._under(policy), each) for policy in policies]
            after = _taken(self._full, each)
            rounds[0] = (rounds[0][0] + after[0]) / 2, (rounds[0][1] + after[1]) / 2
            taken.append(rounds)
            on_prompt(done, len(stretches))
        by_clock = np.array(taken).transpose(2, 1, 0)
        return by_clock[0], by_clock[1]

    def seen(self, stretch: Stretch, exits: tuple[int, ...]) -> FloatArray:
        """PROMPT_V1 of all of a prompt's tokens after each exit, where none leaves, [rows, F]."""
        watcher = StateWatcher(exits)
        self.read([stretch], watcher)
        return np.concatenate(watcher.rows)

    def prices(self, stretches: Sequence[Stretch]) -> tuple[float, float]:
        """Measure what a token's layer, and a skipped layer's keys and values, cost in a prompt.

        Some prompts are read in full and with all tokens leaving in mid-depth, in turn.

        Returns:
            Seconds per token and layer, of a layer and of a fill, by the wall clock.
        """
        middle = max(1, self._layers // 2)
        early = self._under(FixedExit(middle))
        self._warm(stretches[0])
        full_s, full_calls, filled = 0.0, 0, 0
        before_s = early.decoder.overhead.filling_s
        for each in stretches:
            full_s += _taken(self._full, each)[1]
            _taken(early, each)
            full_calls += self._layers * len(each.prompt)
            filled += (self._layers - middle) * (len(each.prompt) - self._kept)
        return full_s / full_calls, (early.decoder.overhead.filling_s - before_s) / filled

    def _under(self, policy: ExitPolicy) -> AdaptiveEngine:
        """The engine that reads with policies, with another one."""
        self._policy.current = policy
        return self._early

    def _warm(self, stretch: Stretch) -> None:
        """Read a prompt both ways: the first launches of a size compile kernels."""
        for engine in (self._full, self._early):
            _taken(engine, stretch)


def _taken(engine: AdaptiveEngine, stretch: Stretch) -> tuple[float, float]:
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    engine.generate([list(stretch.prompt)], FIRST_TOKEN, NeverExit())
    return time.process_time() - cpu_s, time.perf_counter() - wall_s
