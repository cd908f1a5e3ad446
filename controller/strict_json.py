"""JSON objects with exactly the fields that are named: what is signed is read no other way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from offramp.controller.errors import PolicyRefusedError, Refusal

Check = tuple[Callable[[Any], bool], str]
"""A predicate on a JSON value, and what it expects in words."""


def canonical_json(values: dict[str, Any]) -> bytes:
    """JSON with sorted keys and no spaces, ASCII.

    Raises:
        TypeError: a value has no JSON form.
        ValueError: a value is NaN or infinite.
    """
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_strictly(raw: bytes, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Parse a JSON object whose fields are exactly those named.

    Raises:
        PolicyRefusedError: BAD_FORMAT, naming the field unknown, missing, doubled or ill-typed.
    """
    try:
        values = json.loads(raw, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyRefusedError(Refusal.BAD_FORMAT, f"not JSON: {error}") from error
    return require_fields(values, checks)


def require_fields(values: Any, checks: Mapping[str, Check]) -> dict[str, Any]:
    """A parsed object whose fields are exactly those named, as a new dict.

    Raises:
        PolicyRefusedError: BAD_FORMAT, naming the field unknown, missing or ill-typed.
    """
    if not isinstance(values, dict):
        refuse_format(f"a JSON object is expected, not {type(values).__name__}")
    for name in values:
        if name not in checks:
            refuse_format(f"unknown field {name!r}")
    for name, (holds, expected) in checks.items():
        if name not in values:
            refuse_format(f"field {name!r} is missing")
        if not holds(values[name]):
            refuse_format(f"field {name!r} must be {expected}")
    return dict(values)


def refuse_format(detail: str) -> NoReturn:
    """Raise PolicyRefusedError for BAD_FORMAT."""
    raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a field occurs twice among {sorted(name for name, _ in pairs)}")
    return values


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def is_count(value: Any) -> bool:
    """An integer from 0 on that a double can hold exactly (Lua's numbers are doubles)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    """A finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_digest(value: Any) -> bool:
    """A SHA-256 in lower-case hex."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]+", value) is not None


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def or_null(check: Check) -> Check:
    """The same check, or null."""
    holds, expected = check
    return (lambda value: value is None or holds(value)), f"{expected} or null"


def one_of(names: tuple[str, ...]) -> Check:
    """One of some strings."""
    return (lambda value: isinstance(value, str) and value in names), f"one of {', '.join(names)}"


COUNT: Check = (is_count, "an integer from 0 on")
NUMBER: Check = (is_number, "a finite number")
TEXT: Check = (is_text, "a string")
DIGEST: Check = (is_digest, "64 lower-case hex digits")
FINGERPRINT: Check = (_is_fingerprint, "lower-case hex digits")
OBJECT: Check = (_is_object, "an object")
