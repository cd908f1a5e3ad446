"""Prompts that end in mid-line, needles behind other code, and what is made of what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.agents.prompting.prompt_meter import complete_tasks, score
from offramp.agents.prompting.read_tasks import ReadTask, Stretch, tasks_from
from offramp.agents.recording.corpus import load_corpus, long_documents
from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.model.loading import load_tokenizer

FOLLOWING = 24
"""Tokens of the text behind a prompt that is scored."""

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
class ReadOutcome:
    """What came of the tasks read one way; each array has an entry per task."""

    losses_N: NDArray[np.float64]
    similarities_N: NDArray[np.float64]
    needles_N: NDArray[np.float64]
    found_N: NDArray[np.bool_]
    texts: list[str]
    layer_tokens: float


def tasks_of(model: str, documents: int, lines: int, tokens: int) -> list[ReadTask]:
    """Cut prompts of exactly so many tokens from test documents, with a line to complete."""
    texts = [each for each in load_corpus(None) if each.split == "test"]
    found = long_documents(model, texts, 2 * tokens, documents)
    tokenizer = load_tokenizer(model)
    return tasks_from(found, tokenizer, lines=lines, prompt=tokens, following=FOLLOWING)


def needles_of(tokenizer: Any, tasks: Sequence[ReadTask], distance: int) -> list[Stretch]:
    """Prompts as long as the tasks' that ask for a value given ``distance`` tokens before."""
    found = []
    for number, task in enumerate(tasks):
        one, two, three = (WORDS[(number * step + step) % len(WORDS)] for step in (1, 5, 7))
        name, value = f"{one.upper()}_{number}", f"{two}_{three}"
        fact = tokenizer.encode(f'\n\n{name} = "{value}"\n\n')
        question = tokenizer.encode(f'\n\nassert {name} == "')
        room = len(task.line.prompt) - len(fact) - len(question)
        filler = list(task.line.prompt[:room])
        early, late = filler[:-distance], filler[-distance:]
        value_tokens = tuple(tokenizer.encode(f'{value}"'))
        found.append(Stretch((*early, *fact, *late, *question), value_tokens))
    return found


def finds(engine: AdaptiveEngine, needles: Sequence[Stretch]) -> NDArray[np.bool_]:
    """Whether the value is what is said, token for token, behind each prompt."""
    longest = SamplingParams(max_tokens=max(len(each.following) for each in needles))
    said = engine.generate([list(each.prompt) for each in needles], longest, NeverExit())
    pairs = zip(said, needles, strict=True)
    return np.array([tuple(a.token_ids[: len(b.following)]) == b.following for a, b in pairs])


def outcome_of(
    engine: AdaptiveEngine, tasks: Sequence[ReadTask], needles: Sequence[Stretch]
) -> ReadOutcome:
    """Read every prompt in fours, and score what follows at full depth."""
    lines = complete_tasks(engine, tasks)
    read = score(engine, [task.stretch for task in tasks])
    return ReadOutcome(
        losses_N=read.losses_N,
        similarities_N=lines.similarities_N,
        needles_N=score(engine, needles).losses_N,
        found_N=finds(engine, needles),
        texts=lines.texts,
        layer_tokens=float(read.calls_N.mean()),
    )
