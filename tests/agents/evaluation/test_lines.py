"""Line completion: hand-made cases, and cuts of real documents."""

from __future__ import annotations

import pytest

from offramp.agents.evaluation.lines import Line, complete, cut_lines, edit_similarity, exact_match
from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine
from offramp.worker.model.loading import load_tokenizer
from support.models import REFERENCE

TEXT = "".join(f"def function_{n}(argument):\n    return argument + {n}\n\n\n" for n in range(40))


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("", "", 100),
        ("abc", "abc", 100),
        ("abc", "xyz", 0),
        ("", "abc", 0),
        # 2 · 2 / (4 + 2): one block "bc".
        ("abcd", "bc", 67),
        # 2 · 3 / 8: "a" and "cd" in order.
        ("abcd", "acxd", 75),
        # The three examples of fuzzywuzzy's own page for its ratio.
        ("this is a test", "this is a test!", 97),
        ("fuzzy wuzzy was a bear", "wuzzy fuzzy was a bear", 91),
        ("new york mets", "new YORK mets", 69),
    ],
)
def test_edit_similarity_by_hand(prediction: str, target: str, expected: int) -> None:
    assert edit_similarity(prediction, target) == expected


def test_exact_match_counts_words() -> None:
    assert exact_match("return  x", "return x")
    assert not exact_match("return x", "returnx")
    assert not exact_match("", "x")


def test_cuts_give_back_the_line(subtests: pytest.Subtests) -> None:
    tokenizer = load_tokenizer(str(REFERENCE))
    tokens = tokenizer.encode(TEXT)
    lines = cut_lines(tokens, tokenizer, count=12, context=32, longest=24, digest="5a" * 32)
    assert len(lines) == 12
    for line in lines:
        with subtests.test(target=line.target):
            prompt = tokenizer.decode(list(line.prompt))
            assert 8 <= len(line.prompt) <= 32
            assert line.target
            assert "\n" not in line.target
            # What is to be completed follows the prompt in the document.
            assert any(
                TEXT[at + len(prompt) :].partition("\n")[0].strip() == line.target
                for at in range(len(TEXT))
                if TEXT.startswith(prompt, at)
            )


def test_cuts_are_the_same_in_every_run_and_differ_between_documents() -> None:
    tokenizer = load_tokenizer(str(REFERENCE))
    tokens = tokenizer.encode(TEXT)

    def cut(digest: str) -> list[Line]:
        return cut_lines(tokens, tokenizer, count=5, context=32, longest=24, digest=digest)

    assert cut("a" * 64) == cut("a" * 64)
    assert cut("a" * 64) != cut("b" * 64)
    assert cut_lines([1, 2], tokenizer, count=5, context=32, longest=24, digest="a" * 64) == []


def test_a_completion_is_the_first_line_of_greedy_generation() -> None:
    engine = AdaptiveEngine.from_pretrained(REFERENCE, slots=4)
    tokens = engine.tokenizer.encode(TEXT)
    lines = cut_lines(tokens, engine.tokenizer, count=6, context=32, longest=24, digest="7" * 64)
    found = complete(engine, lines, NeverExit(), 16)
    assert len(found) == 6
    for line, text in zip(lines, found, strict=True):
        [whole] = engine.generate([list(line.prompt)], policy=NeverExit())
        shorter = engine.tokenizer.decode(whole.token_ids[:16])
        assert text == shorter.partition("\n")[0].strip()
