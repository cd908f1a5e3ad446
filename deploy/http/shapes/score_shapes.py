"""Requests and replies of /v1/score, as vLLM has them, and what is refused of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired  # pydantic reads it before Python 3.12

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from offramp.controller.errors import RequestError
from offramp.deploy.http.shapes.class_shapes import ClassifyUsage, Texts, field_of, texts_of
from offramp.deploy.http.shapes.offramp_options import Nullable, QualityOptions


class ScoreOptions(QualityOptions):
    """The namespace ``offramp`` of a request for scores."""

    label: str | None = Field(
        default=None, description="Class whose chance is the score; of two, the second by default."
    )
    best: bool = Field(
        default=False,
        description="Run to the end only what may be the best; the others' scores are early ones.",
    )


class ScoreRequest(Nullable):
    """Body of POST /v1/score. Unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str
    text_1: Texts
    text_2: Texts
    offramp: ScoreOptions = ScoreOptions()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is scored: each of the second texts behind its first, or behind the one there is.

        Raises:
            RequestError: the numbers do not fit, or a second text is empty.
        """
        second = texts_of(self.text_2, "text_2")
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        if len(first) not in (1, len(second)):
            problem = f"holds {len(second)} texts, and text_1 {len(first)}"
            raise RequestError("text_2", problem, "Send one text_1, or as many")
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))

    def fields(self, place: int) -> tuple[str, str]:
        """What errors call the two texts of a pair."""
        first = self.text_1
        is_one = isinstance(first, str) or len(first) == 1
        return (
            field_of(first, "text_1", 0 if is_one else place),
            field_of(self.text_2, "text_2", place),
        )


class TextScore(TypedDict):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float
    offramp: NotRequired[dict[str, Any]]


class ScoreReply(TypedDict):
    """Reply of /v1/score."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextScore]
    usage: ClassifyUsage


def scored_label(asked: str | None, labels: Sequence[str]) -> int:
    """Index of the class whose chance is the score.

    Raises:
        RequestError: there is no such class, or none is named of more than two.
    """
    if asked is None and len(labels) == 2:
        return 1
    if asked not in labels:
        problem = "is missing" if asked is None else f"{asked!r:.60} is no class of this model"
        raise RequestError("offramp.label", problem, f"Name one of {', '.join(labels)}"[:400])
    return list(labels).index(str(asked))
