"""JSON that is signed: one canonical form to write, and strict checks of every field read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection
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


def parse_strictly(
    raw: bytes, checks: dict[str, Check], optional: Collection[str] = ()
) -> dict[str, Any]:
    """Parse a JSON object whose fields are exactly those named.

    Args:
        raw: The object as it came.
        checks: What each field must be.
        optional: Fields among them that may be missing.

    Raises:
        PolicyRefusedError: BAD_FORMAT, naming the field unknown, missing, doubled or ill-typed.
    """
    try:
        values = json.loads(raw, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyRefusedError(Refusal.BAD_FORMAT, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        refuse(f"a JSON object is expected, not {type(values).__name__}")
    check_fields(values, checks, optional=optional)
    return dict(values)


def check_fields(
    values: dict[str, Any],
    checks: dict[str, Check],
    prefix: str = "",
    optional: Collection[str] = (),
) -> None:
    """Refuse an object whose fields are not exactly those named.

    Args:
        values: The object.
        checks: What each field must be.
        prefix: Put before each name in a refusal, such as ``params.``.
        optional: Fields that may be missing.

    Raises:
        PolicyRefusedError: BAD_FORMAT, naming the field unknown, missing or ill-typed.
    """
    for name in values:
        if name not in checks:
            refuse(f"unknown field {prefix + name!r}")
    for name, (holds, expected) in checks.items():
        if name not in values and name not in optional:
            refuse(f"field {prefix + name!r} is missing")
        if name in values and not holds(values[name]):
            refuse(f"field {prefix + name!r} must be {expected}")


def refuse(detail: str) -> NoReturn:
    """Raise PolicyRefusedError BAD_FORMAT."""
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
    """A number that a double can hold, and no boolean."""
    # Compared, not converted: an integer of any length is compared exactly.
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_digest(value: Any) -> bool:
    """A SHA-256 in lower-case hex."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_fingerprint(value: Any) -> bool:
    """Lower-case hex, of any length but none."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]+", value) is not None


def is_share(value: Any) -> bool:
    """A number in [0, 1]."""
    return is_number(value) and 0 <= value <= 1


def or_null(check: Check) -> Check:
    """The same check, but null passes too."""
    holds, expected = check
    return (lambda value: value is None or holds(value)), f"{expected} or null"


def list_of(check: Check) -> Check:
    """A list whose every entry passes."""
    holds, expected = check
    return (lambda value: isinstance(value, list) and all(map(holds, value))), (
        f"a list, each entry {expected}"
    )


COUNT: Check = (is_count, "an integer from 0 on")
NUMBER: Check = (is_number, "a finite number")
TEXT: Check = (is_text, "a string")
DIGEST: Check = (is_digest, "64 lower-case hex digits")
FINGERPRINT: Check = (is_fingerprint, "lower-case hex digits")
SHARE: Check = (is_share, "a number in [0, 1]")
FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Check = (lambda value: isinstance(value, dict), "an object")
