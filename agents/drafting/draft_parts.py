"""What drafters are taught from: the model's own continuations, and what a token costs here.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_ppo import DraftPPOConfig
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus, tokenize
from offramp.agents.recording.documents import Document
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import IntArray
from offramp.controller.policies.exits import Exit, ascend, is_on_copy
from offramp.controller.policies.protocols import NeverExit
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig

TOGETHER = 16
"""Documents that the model continues side by side while they are recorded."""

Progress = Callable[[str, int, int], None]
"""Told (stage, done so far, in all)."""

Pairs = Sequence[tuple[Document, Sequence[int]]]
"""Documents with their token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftingConfig:
    """How drafters are taught.

    Attributes:
        model: Folder of the model that drafts for itself.
        corpus: Folder of documents whose beginnings are continued; "" takes Python's standard
            library.
        documents: Documents to take from the corpus, over all splits.
        exits: Layers that a draft may leave after, those on a copy in fewer bytes first, as
            ``Exit(12, "int4")``; () places four within the first half of the model's own.
        dtype: Weights' dtype, "float32" or "bfloat16".
        translators: Folder that ``offramp tune`` wrote for the model; "" reads exits as they are.
        prompt_tokens: Tokens of each document that are read before the model goes on.
        new_tokens: Tokens that the model goes on for.
        candidates: Candidate tokens per token, the best of which is drafted without the LM head.
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
    candidates: int = 64
    profile_s: float = 60.0
    threads: int = 1
    seed: int = 0
    ppo: DraftPPOConfig = field(default_factory=lambda: DraftPPOConfig(steps=1_500_000))

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1")
        if self.candidates < 2:
            raise ConfigError("candidates", f"{self.candidates} is below 2")
        if self.profile_s <= 0:
            raise ConfigError("profile_s", f"{self.profile_s} is not above 0")


@dataclass(slots=True, kw_only=True)
class DraftParts:
    """What drafting families are placed from.

    Attributes:
        config: Settings, the seed of ``ppo`` in place.
        train: The model's continuations of training documents.
        validation: Those of validation documents, which choose.
        costs: What a token's parts cost here.
        candidates_VK: What the model itself says after each token, most frequent first.
        on_progress: Told as training advances.
        placed: Contenders of the families that were placed so far, by family.
    """

    config: DraftingConfig
    train: TokenTraces
    validation: TokenTraces
    costs: CostTable
    candidates_VK: IntArray
    on_progress: Progress
    placed: dict[str, list[Contender]] = field(default_factory=dict)


def record_parts(
    config: DraftingConfig, engine: AdaptiveEngine, on_progress: Progress
) -> tuple[DraftParts, list[list[int]]]:
    """Record continuations and measure costs; also gives the validation documents' prompts.

    Raises:
        ConfigError, TraceError: as ``teach_drafters``.
    """
    exits = _exits_of(config, engine)
    train, validation = _documents(config)
    own = engine.config
    many = AdaptiveEngine(engine.model, engine.tokenizer, slots=TOGETHER, config=own)
    spoken = _continued(many, train, config)
    table_VK = successor_table(spoken, engine.stack.vocab, config.candidates)
    wanted = Continuations(
        exits=exits, prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens
    )

    def record(stage: str, documents: Pairs) -> TokenTraces:
        return record_continuations(
            many, documents, wanted, lambda *count: on_progress(stage, *count), table_VK
        )

    recorded, held_out = record("record", train), record("record validation", validation)
    alone = AdaptiveEngine(engine.model, engine.tokenizer, slots=1, config=own)
    profile = ProfileConfig(rows=(1,), limit_s=config.profile_s)
    parts = DraftParts(
        config=config,
        train=recorded,
        validation=held_out,
        costs=measure_costs(alone, table_VK, profile).costs,
        candidates_VK=table_VK,
        on_progress=on_progress,
    )
    return parts, [list(tokens[: config.prompt_tokens]) for _, tokens in validation]


def _exits_of(config: DraftingConfig, engine: AdaptiveEngine) -> tuple[int, ...]:
    layers = engine.stack.layers
    exits = config.exits or tuple(
        sorted({max(1, layers * part // 12) for part in (2, 3, 5, 6)} - {layers})
    )
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


def _documents(config: DraftingConfig) -> tuple[Pairs, Pairs]:
    """Training and validation documents that are longer than a prompt."""
    corpus = load_corpus(Path(config.corpus) if config.corpus else None, config.documents)
    longer = [
        pair for pair in tokenize(config.model, corpus) if len(pair[1]) > config.prompt_tokens
    ]
    found = [[pair for pair in longer if pair[0].split == s] for s in ("train", "validation")]
    if not all(found):
        raise TraceError(
            "corpus",
            f"has no training or no validation document of over {config.prompt_tokens} tokens",
            "Add documents, or ask for shorter prompts",
        )
    return found[0], found[1]


def _continued(engine: AdaptiveEngine, documents: Pairs, config: DraftingConfig) -> list[list[int]]:
    """The documents' beginnings as the model goes on with them, at full depth."""
    prompts = [list(tokens[: config.prompt_tokens]) for _, tokens in documents]
    sampling = SamplingParams(max_tokens=config.new_tokens, ignore_eos=True)
    done = engine.generate(prompts, sampling, NeverExit())
    return [[*prompt, *each.token_ids] for prompt, each in zip(prompts, done, strict=True)]
