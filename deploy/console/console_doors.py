"""Lets operators in: a key in the header, or a session that was opened with it."""

from __future__ import annotations

import secrets
import threading
import time
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

from offramp.deploy.clients.client_keys import ClientKeys

COOKIE = "offramp_console"
"""Name of the session's cookie, which no script can read and no other site can have sent."""

SESSION_S = 12 * 3600.0
"""Seconds that a session lasts."""

MAX_SESSIONS = 64
"""Sessions kept; the oldest goes first."""


class Doors:
    """Knows the key, as a hash, and the sessions that were opened with it.

    Args:
        key: What operators must present.
    """

    def __init__(self, key: str) -> None:
        self._keys = ClientKeys(shared=key)
        self._sessions: dict[str, float] = {}
        self._turn = threading.Lock()

    def open(self, key: str) -> str | None:
        """Begin a session; returns its token, or None if the key is wrong."""
        if self._keys.client(key) is None:
            return None
        token = secrets.token_urlsafe(32)
        with self._turn:
            self._sessions[token] = time.monotonic() + SESSION_S
            while len(self._sessions) > MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
        return token

    def close(self, token: str) -> None:
        """End a session."""
        with self._turn:
            self._sessions.pop(token, None)

    def knows(self, request: Request) -> bool:
        """Whether whoever asks is an operator.

        A session alone changes nothing unless the browser says that this very site sent the
        request: ports of one host share cookies.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._keys.client(key) is not None
        until = self._sessions.get(request.cookies.get(COOKIE, ""), 0.0)
        return until > time.monotonic() and (request.method == "GET" or is_own_page(request))

    def require(self, request: Request) -> None:
        """Refuse whoever is no operator.

        Raises:
            HTTPException: 401.
        """
        if not self.knows(request):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "the console's key is missing or wrong", challenge)


def is_own_page(request: Request) -> bool:
    """Whether a page of this very site sent a request."""
    return urlsplit(request.headers.get("origin", "")).netloc == request.headers.get("host", "-")
