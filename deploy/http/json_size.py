"""How much there is to parse in a body, told before it is parsed."""

from __future__ import annotations

MOST_LEFT_OUT = 2**14
"""So many strings are taken out before counting; of more, what is text counts, too."""


KEY_VALUES = 4
"""A key counts as so many values: it takes a string, its hash, and a place in a table."""


def json_values(body: bytes) -> int:
    """Count the values of a JSON text, keys as ``KEY_VALUES``; at least as many as there are.

    A parser holds the interpreter's lock while it makes an object of each, and every stream waits:
    seconds for a body of 8 MB, where this takes tens of milliseconds. Any bytes have some count.

    >>> json_values(b'{"prompt": ["a, [b]", "", 1]}')
    9
    """
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') // 2 <= MOST_LEFT_OUT:
        body = b"".join(body.split(b'"')[::2])
    keys = body.count(b":")
    return 1 + KEY_VALUES * keys + sum(map(body.count, (b",", b"[", b"{")))
