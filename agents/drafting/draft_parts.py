"""What drafters are taught from: the model's own continuations, and what a token costs here.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_chances import FittedChances, fit_chances
from offramp.agents.drafting.draft_ppo import DraftPPOConfig
from offramp.agents.drafting.insight_fit import token_kinds
from offramp.agents.drafting.likely_exits import best_of, likely_exits
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.own_text import (
    OWN_TEXT,
    TOGETHER,
    Batch,
    OwnText,
    Spoken,
    begin_all,
    speak_all,
)
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import IntArray
from offramp.controller.policies.exits import Exit, ascend, is_on_copy
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig, spans_of
from offramp.worker.recording.going_on import go_on

LEARNED_SPLITS = ("train", "validation")
"""What is learned from, and what choices are made on."""

PROFILED = 64
"""Candidates that a probe of them is timed with where drafts come from the head."""

Progress = Callable[[str, int, int], None]
"""Told (stage, done so far, in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftingConfig:
    """How drafters are taught.

    Attributes:
        model: Folder of the model that drafts for itself.
        corpus: Folder of documents whose beginnings are continued; "" takes Python's standard
            library.
        documents: Documents to take from the corpus, over all splits.
        exits: Layers that a draft may leave after, those on a copy in fewer bytes first, as
            ``Exit(12, "int4")``; () takes those of the model's own that are likeliest to pay.
        dtype: Weights' dtype, "float32" or "bfloat16".
        translators: Folder that ``offramp tune`` wrote for the model; "" reads exits as they are.
        prompt_tokens: Tokens of each document that are read before the model goes on.
        new_tokens: Tokens that the model goes on for.
        temperature: At which it does; 0 is greedy.
        candidates: Candidate tokens per token, the best of which is drafted without the LM head; 0
            drafts what the head says.
        insight: Whether drafters also read the state, and what kind of token was read last, where
            they judge whether a draft is right. In training that takes 2·D bytes a token and exit.
        profile_s: Seconds of measuring what a token's parts cost here.
        threads: Torch threads, in training and while costs are measured.
        seed: Seed of everything random; it replaces the one of ``ppo``.
        ppo: Hyper-parameters of the drafter.
    """

    model: str
    corpus: str = ""
    documents: int = 320
    exits: tuple[int | Exit, ...] = ()
    dtype: str = "float32"
    translators: str = ""
    prompt_tokens: int = 64
    new_tokens: int = 192
    temperature: float = 0.0
    candidates: int = 64
    insight: bool = False
    profile_s: float = 60.0
    threads: int = 1
    seed: int = 0
    ppo: DraftPPOConfig = field(default_factory=lambda: DraftPPOConfig(steps=1_500_000))

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1")
        OwnText(temperature=self.temperature)
        if self.candidates < 2 and self.candidates != 0:
            problem = f"{self.candidates} is below 2"
            raise ConfigError("candidates", problem, "Use 2 or more, or 0 to draft with the head")
        if self.profile_s <= 0:
            raise ConfigError("profile_s", f"{self.profile_s} is not above 0")


@dataclass(slots=True, kw_only=True)
class DraftParts:
    """What drafting families are placed from.

    Attributes:
        config: Settings, the seed of ``ppo`` in place.
        train: The model's continuations of training documents.
        validation: Those of validation documents, which choose.
        fitted: How likely the training documents' drafts are right.
        costs: What a token's parts cost here.
        candidates_VK: What the model itself says after each token, most frequent first; None where
            drafts come from the head.
        on_progress: Told as training advances.
        placed: Contenders of the families that were placed so far, by family.
    """

    config: DraftingConfig
    train: TokenTraces
    validation: TokenTraces
    fitted: FittedChances
    costs: CostTable
    candidates_VK: IntArray | None
    on_progress: Progress
    placed: dict[str, list[Contender]] = field(default_factory=dict)


def record_parts(
    config: DraftingConfig, engine: AdaptiveEngine, folder: Path, on_progress: Progress
) -> tuple[DraftParts, list[list[int]]]:
    """Record continuations and measure costs; also gives the validation documents' prompts.

    The model's texts are kept in the folder, and read back if it was cut off.

    Raises:
        ConfigError, TraceError: as ``teach_drafters``.
    """
    exits = _exits_of(config, engine)
    own = engine.config
    many = AdaptiveEngine(engine.model, engine.tokenizer, slots=TOGETHER, config=own)
    train, validation = _spoken(config, many, folder, on_progress)
    table_VK = successor_table(
        [each.tokens[:-1] for each in train], engine.stack.vocab, config.candidates or PROFILED
    )
    drafted_VK = table_VK if config.candidates else None
    wanted = Continuations(
        exits=exits, prompt_tokens=None, new_tokens=config.new_tokens, states=config.insight
    )

    def record(stage: str, spoken: Sequence[Spoken]) -> TokenTraces:
        return record_continuations(
            many,
            [(each.document, each.prompt) for each in spoken],
            wanted,
            lambda *count: on_progress(stage, *count),
            drafted_VK,
            [each.new for each in spoken],
        )

    recorded, held_out = record("record", train), record("record validation", validation)
    kinds = token_kinds(engine.tokenizer, engine.stack.vocab) if config.insight else None
    alone = AdaptiveEngine(engine.model, engine.tokenizer, slots=1, config=own)
    profile = ProfileConfig(
        rows=(1,), tokens=spans_of(config.ppo.max_pending), limit_s=config.profile_s
    )
    parts = DraftParts(
        config=config,
        train=recorded,
        validation=held_out,
        fitted=fit_chances(recorded, kinds),
        costs=measure_costs(
            alone, table_VK, profile, lambda *s: on_progress("costs", *map(round, s))
        ).costs,
        candidates_VK=drafted_VK,
        on_progress=on_progress,
    )
    return parts, [each.prompt for each in validation]


def _exits_of(config: DraftingConfig, engine: AdaptiveEngine) -> tuple[int, ...]:
    layers = engine.stack.layers
    exits = config.exits or best_of(likely_exits(engine))
    if not ascend(exits) or any(e >= layers + is_on_copy(e) for e in exits):
        raise ConfigError(
            "exits",
            f"{exits} do not ascend within [1, {layers - 1}], or on a copy within [1, {layers}]",
            "Use layers of the model, those on a copy first",
        )
    if config.prompt_tokens + config.new_tokens >= engine.stack.context:
        raise ConfigError(
            "new_tokens",
            f"{config.new_tokens} after {config.prompt_tokens} exceed the model's context of "
            f"{engine.stack.context}",
            "Ask for fewer",
        )
    return exits


def _spoken(
    config: DraftingConfig, engine: AdaptiveEngine, folder: Path, on_progress: Progress
) -> tuple[list[Spoken], list[Spoken]]:
    """What the model says after the beginnings of training and of validation documents."""
    corpus = load_corpus(Path(config.corpus) if config.corpus else None, config.documents)
    lengths = (config.prompt_tokens, config.new_tokens + 1)
    prompts = [
        (document, prompt)
        for document, prompt in begin_all(engine.tokenizer, corpus, lengths, engine.stack.context)
        if document.split != "test" and (document.turns or len(prompt) == config.prompt_tokens)
    ]

    def speak(batches: Iterable[Batch]) -> Iterator[list[list[int]]]:
        for tokens, seeds in batches:
            yield go_on(
                engine, tokens, lengths[1], config.temperature, seeds=seeds, ignore_eos=True
            )

    settings = {
        "temperature": config.temperature, "new_tokens": lengths[1], "dtype": config.dtype,
        "model": engine.model_fingerprint, "ignore_eos": True,
    }  # fmt: skip
    spoken = speak_all(
        folder / OWN_TEXT, settings, prompts, speak, lambda *n: on_progress("own text", *n)
    )
    found = [[each for each in spoken if each.document.split == s] for s in LEARNED_SPLITS]
    if not all(found):
        raise TraceError(
            "corpus",
            f"has no training or no validation document of over {config.prompt_tokens} tokens",
            "Add documents, or ask for shorter prompts",
        )
    return found[0], found[1]
