"""Prompts that end in mid-line, needles behind other code, and what is made of what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.agents.evaluation.lines import Line, cut_lines, edit_similarity
from offramp.agents.recording.corpus import load_corpus, long_documents
from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.follow import nats_per_token, submit_scored
from offramp.worker.model.loading import load_tokenizer

PROMPT, LONGEST, FOLLOWING = 512, 48, 24
"""Tokens of a prompt, of a completed line at most, and of the text behind it that is scored."""

ONE_LINE = SamplingParams(max_tokens=LONGEST, stop=("\n",))
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "flint",
    "grove",
    "hazel",
    "inlet",
    "jasper",
    "kelp",
    "larch",
]


@dataclass(frozen=True, slots=True)
class ReadTask:
    """A prompt from a document, the rest of its line, and the document's own next tokens."""

    document: int
    line: Line
    following: tuple[int, ...]


class Needle(NamedTuple):
    """A prompt, and the tokens that are scored behind it."""

    prompt: tuple[int, ...]
    following: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadOutcome:
    """What came of the tasks read one way; each array has an entry per task."""

    losses_N: NDArray[np.float64]
    similarities_N: NDArray[np.float64]
    needles_N: NDArray[np.float64]
    texts: list[str]
    layer_tokens: float


def tasks_of(model: str, documents: int, lines: int) -> list[ReadTask]:
    """Cut prompts of exactly PROMPT tokens from test documents, with a line to complete."""
    texts = [each for each in load_corpus(None) if each.split == "test"]
    tokenizer = load_tokenizer(model)
    found: list[ReadTask] = []
    for number, (document, tokens) in enumerate(
        long_documents(model, texts, 2 * PROMPT, documents)
    ):
        cut = cut_lines(
            tokens,
            tokenizer,
            count=4 * lines,
            context=PROMPT,
            longest=LONGEST,
            digest=document.digest,
        )
        whole = [each for each in cut if len(each.prompt) == PROMPT][:lines]
        for line in whole:
            end = _end_of(tokens, line.prompt)
            following = tuple(tokens[end : end + FOLLOWING])
            if len(following) == FOLLOWING:
                found.append(ReadTask(number, line, following))
    return found


def _end_of(tokens: Sequence[int], part: tuple[int, ...]) -> int:
    places = (n for n in range(len(tokens)) if tuple(tokens[n : n + len(part)]) == part)
    return next(places) + len(part)


def needles_of(tokenizer: Any, tasks: Sequence[ReadTask], distance: int) -> list[Needle]:
    """Prompts of PROMPT tokens that ask for a value given ``distance`` tokens before."""
    found = []
    for number, task in enumerate(tasks):
        one, two, three = (WORDS[(number * step + step) % len(WORDS)] for step in (1, 5, 7))
        name, value = f"{one.upper()}_{number}", f"{two}_{three}"
        fact = tokenizer.encode(f'\n\n{name} = "{value}"\n\n')
        question = tokenizer.encode(f'\n\nassert {name} == "')
        room = PROMPT - len(fact) - len(question)
        filler = list(task.line.prompt[:room])
        early, late = filler[:-distance], filler[-distance:]
        value_tokens = tuple(tokenizer.encode(f'{value}"'))
        found.append(Needle((*early, *fact, *late, *question), value_tokens))
    return found


def losses_of(engine: AdaptiveEngine, parts: Sequence[Needle]) -> NDArray[np.float64]:
    """Nats per token of what follows each prompt, fed at full depth, [N]."""
    requests = [submit_scored(engine, *part) for part in parts]
    finished: dict[str, Any] = {}
    while len(finished) < len(requests):
        engine.step(finished)
    return np.array([nats_per_token(finished[request.id]) for request in requests])


def outcome_of(
    engine: AdaptiveEngine, tasks: Sequence[ReadTask], needles: Sequence[Needle]
) -> ReadOutcome:
    """Read every prompt in fours, and score what follows at full depth."""
    done = engine.generate([list(task.line.prompt) for task in tasks], ONE_LINE, NeverExit())
    texts = [each.text.strip() for each in done]
    scored = zip(texts, tasks, strict=True)
    calls = sum(each.stats.prompt_calls for each in done)
    return ReadOutcome(
        losses_N=losses_of(engine, [Needle(t.line.prompt, t.following) for t in tasks]),
        similarities_N=np.array([edit_similarity(t, task.line.target) / 100 for t, task in scored]),
        needles_N=losses_of(engine, needles),
        texts=texts,
        layer_tokens=calls / (PROMPT * len(tasks) * engine.stack.layers),
    )
