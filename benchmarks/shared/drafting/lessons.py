"""What drafters are made from: the model's own continuations, costs, candidates, rules.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_replay import Chosen
from offramp.agents.recording.documents import Document
from offramp.controller.costs.table import CostTable
from offramp.controller.features import MAX_PENDING, IntArray
from offramp.controller.policies.protocols import NeverExit
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.draft_rules import del_rule, thompson_grid
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig, spans_of
from shared.drafting.contest import SAY, parts_of

TOGETHER = 16
"""Prompts continued side by side while they are recorded."""


@dataclass
class Lesson:
    """What drafters are made from: what was recorded to learn from and to choose on.

    Attributes:
        table_VK: Candidates of the headless; None: drafts come from the head.
    """

    train: TokenTraces
    validation: TokenTraces
    costs: CostTable
    table_VK: IntArray | None = None


def is_static(chosen: Chosen) -> bool:
    return "static" in chosen.name


def head_rules(lesson: Lesson, most: int = MAX_PENDING) -> list[Chosen]:
    """DEL and Thompson sampling, which know no drafts but the head's; at most so many a cycle."""
    train, validation, costs = lesson.train, lesson.validation, lesson.costs
    return [del_rule(train, validation, costs, most)[0], thompson_grid(validation, costs, most)[0]]


def spoken_table(
    engine: AdaptiveEngine, prompts: Sequence[list[int]], new_tokens: int, candidates: int
) -> IntArray:
    """Candidates by what the model itself says after each token."""
    many = AdaptiveEngine(engine.model, engine.tokenizer, slots=TOGETHER)
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    done = many.generate(prompts, sampling, NeverExit(), kv_mode="project")
    spoken = [[*p, *each.token_ids] for p, each in zip(prompts, done, strict=True)]
    return successor_table(spoken, engine.stack.vocab, candidates)


def record(
    engine: AdaptiveEngine,
    prompts: Sequence[list[int]],
    exits: tuple[int, ...],
    new_tokens: int,
    table_VK: IntArray | None = None,
) -> TokenTraces:
    """The model's own tokens after each prompt, as exits see them; headless with a table."""
    many = AdaptiveEngine(engine.model, engine.tokenizer, slots=TOGETHER, config=engine.config)
    documents = [(Document.of(str(prompt), "prompt"), prompt) for prompt in prompts]
    wanted = Continuations(exits=exits, prompt_tokens=None, new_tokens=new_tokens)
    traces = record_continuations(many, documents, wanted, candidates_VK=table_VK)
    agree = dict(zip(map(str, exits), traces.agree_NE.mean(0).round(3).tolist(), strict=True))
    kind = "head" if table_VK is None else "best candidate"
    SAY.print(f"{len(prompts)} prompts, {len(traces)} tokens; {kind} right by exit: {agree}")
    return traces


def profile(
    engine: AdaptiveEngine,
    table_VK: IntArray,
    limit_s: float,
    context: int | None = None,
    most: int = MAX_PENDING,
) -> CostTable:
    """What a token's parts cost here, at batch 1 with up to so many drafts; tells the reader."""
    config = ProfileConfig(rows=(1,), limit_s=limit_s, tokens=spans_of(most))
    if context is not None:
        config = replace(config, context=context)
    costs = measure_costs(engine, table_VK, config).costs
    copies = {name: f"{1e6 * costs.on_copy(name).layer_s:.0f}" for name in costs.copies}
    SAY.print({**parts_of(costs), "copy's layer_us": copies})
    return costs
