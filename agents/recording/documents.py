"""Documents: texts and conversations, named by their content, which chooses their split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from offramp.controller.errors import TraceError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

TRAIN_SHARE = 0.70
"""Share of all documents that policies are trained on."""
VALIDATION_SHARE = 0.15
"""Share that choices are made on; what is left is the test split."""

ROLES = ("system", "user", "assistant", "tool")
FORMS = "messages, prompt with completion, or text"
"""What a line of a `.jsonl` file may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text or conversation, named by its content.

    Attributes:
        text: The whole text, line ends as `\\n`; of a conversation its turns, one after the other.
        digest: SHA-256 of the UTF-8 text, or of the turns as JSON, hexadecimal.
        path: Where it was found, relative to the corpus root, with `/`; of a `.jsonl` file with
            the line.
        split: The split it belongs to, a function of `digest` alone.
        turns: A conversation's roles and contents; () for a text.
    """

    text: str
    digest: str
    path: str
    split: Split
    turns: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, text: str, path: str) -> Document:
        """Name a text by its content and let the content choose the split."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(text=text, digest=digest, path=path, split=split_of(digest))

    @classmethod
    def of_turns(cls, turns: Sequence[tuple[str, str]], path: str) -> Document:
        """Name a conversation by its roles and contents."""
        digest = hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()
        text = "\n\n".join(content for _, content in turns)
        return cls(text=text, digest=digest, path=path, split=split_of(digest), turns=tuple(turns))


def split_of(digest: str) -> Split:
    """The split of the document with this hexadecimal SHA-256."""
    # The last digits: documents are ordered by the first, and a limit cuts that order.
    draw = int(digest[-8:], 16) / 16**8
    if draw < TRAIN_SHARE:
        return "train"
    return "validation" if draw < TRAIN_SHARE + VALIDATION_SHARE else "test"


def read_line(line: str, path: str) -> Document:
    """Read one line of a `.jsonl` file: a conversation, a prompt with its completion, or a text.

    It holds `messages` (a list of `role` and `content`), `prompt` and `completion` (two texts, or
    two such lists), or `text`; other fields are not read.

    Args:
        line: A JSON object.
        path: Where it stands, for errors.

    Raises:
        TraceError: naming the line, and what is wrong with it.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad_line(path, f"is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _bad_line(path, "is no JSON object")
    if "messages" in fields:
        return Document.of_turns(_turns(fields["messages"], path), path)
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Document.of(prompt + completion, path)
        return Document.of_turns([*_turns(prompt, path), *_turns(completion, path)], path)
    if isinstance(fields.get("text"), str):
        return Document.of(fields["text"], path)
    raise _bad_line(path, f"has none of {FORMS}, but {', '.join(map(str, fields)) or 'nothing'}")


def encode(tokenizer: Any, document: Document) -> list[int]:
    """Token ids of a document; of a conversation by the model's own chat template.

    Raises:
        TraceError: a conversation, and the model has no chat template, or it refuses the turns.
    """
    if not document.turns:
        return list(tokenizer(document.text, verbose=False)["input_ids"])
    return encode_turns(tokenizer, document.path, document.turns)


def encode_turns(
    tokenizer: Any, path: str, turns: Sequence[tuple[str, str]], *, answers: bool = False
) -> list[int]:
    """Token ids of a conversation by the model's own chat template.

    Args:
        tokenizer: The model's.
        path: Where the conversation stands, for errors.
        turns: Roles and contents.
        answers: Whether the model's next turn begins at the end.

    Raises:
        TraceError: the model has no chat template, or it refuses the turns.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=answers
        )
    except Exception as error:  # a template is a model's code, and raises what it likes
        problem = f"{path} does not fit the model's chat template ({error})"
        remedy = "Use a model with such a template, or documents of prompt with completion, or text"
        raise TraceError("corpus", problem, remedy) from error
    return list(found)


def _turns(messages: Any, path: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise _bad_line(path, "has messages that are no list of role and content")
    return [_turn(message, path) for message in messages]


def _turn(message: Any, path: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise _bad_line(path, "has a message that is no object of role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _bad_line(path, f"has the role {role!r}, not one of {', '.join(ROLES)}")
    if isinstance(content, list):  # OpenAI's content parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise _bad_line(path, f"has a message of {role} with a part that is no text")
        content = "\n".join(map(str, parts))
    if not isinstance(content, str) or not content:
        raise _bad_line(path, f"has a message of {role} without text")
    return str(role), content


def _bad_line(path: str, problem: str) -> TraceError:
    return TraceError("corpus", f"{path} {problem}", f"Give {FORMS} on each line")
