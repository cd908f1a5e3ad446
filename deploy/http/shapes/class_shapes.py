"""Requests and replies of /v1/classify, as vLLM has them, and what is refused of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired  # pydantic reads it before Python 3.12

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from offramp.controller.errors import RequestError
from offramp.deploy.clients.allowances import LOSSLESS
from offramp.deploy.http.shapes.offramp_options import Nullable, QualityOptions, quality_of

Texts = str | Annotated[list[str], Field(min_length=1, fail_fast=True)]


class ClassifyRequest(Nullable):
    """Body of POST /v1/classify. Unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: Texts
    offramp: QualityOptions = QualityOptions()

    @property
    def texts(self) -> list[str]:
        """The texts, one or several.

        Raises:
            RequestError: one is empty; its place is the field.
        """
        return texts_of(self.input, "input")

    def fields(self, place: int) -> tuple[str, str]:
        """What errors call a text, and that before it, which is none."""
        return ("input", field_of(self.input, "input", place))


class TextClass(TypedDict):
    """What was found of one text."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    offramp: NotRequired[dict[str, Any]]


class ClassifyUsage(TypedDict):
    """Tokens counted."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]


class ClassifyReply(TypedDict):
    """Reply of /v1/classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextClass]
    usage: ClassifyUsage


def texts_of(given: str | list[str], name: str) -> list[str]:
    """The texts of a field, one or several.

    Raises:
        RequestError: one is empty; its place is the field.
    """
    found = [given] if isinstance(given, str) else given
    for place, text in enumerate(found):
        if not text.strip():
            field = field_of(given, name, place)
            raise RequestError(field, "is empty", "Leave it out, or give it words")
    return found


def field_of(given: str | list[str], name: str, place: int) -> str:
    """What errors call a text of a field: by its place where there may be several."""
    return name if isinstance(given, str) else f"{name}[{place}]"


def quality_within(least: float | str | None, options: QualityOptions) -> float | None:
    """1 minus the loss that a certificate must bound; None leaves it to the served policy.

    Args:
        least: What the client's key promises, also to who asks for nothing; None: nothing.
        options: What the request asks for.

    Raises:
        RequestError: it asks for less, or for no share.
    """
    asked: float | None = None
    if options.quality is not None:
        found = quality_of(options.quality)
        asked = 1.0 if isinstance(found, str) else found
    promised = 1.0 if least == LOSSLESS else least
    if promised is None or asked is None:
        return asked if promised is None else float(promised)
    if asked < float(promised):
        problem = f"{asked} does not promise the {least} that this key asks for"
        raise RequestError("offramp.quality", problem, "Leave it out")
    return asked
