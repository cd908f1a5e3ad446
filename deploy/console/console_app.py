"""Answers the console's routes: its page, the admin API, and the stream of events."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
from jinja2 import Environment, FileSystemLoader
from pydantic import BaseModel, ConfigDict, Field

from offramp.controller.errors import (
    ConfigError,
    OfframpError,
    PolicyRefusedError,
    PromoteConflictError,
    RegistryUnavailableError,
)
from offramp.controller.release.registry import PolicyRegistry
from offramp.deploy.cli.releases.past import COLUMNS, differences, past_releases
from offramp.deploy.cli.releases.tracks import COLUMNS_OF_TRACKS, points_of
from offramp.deploy.console.candidates import PICTURE
from offramp.deploy.console.channel_view import EVENTS, NOT_REPORTED, view_channel
from offramp.deploy.console.console_doors import COOKIE, SESSION_S, Doors, is_own_page
from offramp.deploy.serve.publishing import KEY, open_ledger, open_publisher
from offramp.deploy.serve.settings import Settings

HERE = Path(__file__).parent

EVERY_S = 1.0
"""Seconds between two looks of an event stream at the registry."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""Sent with every reply: nothing from elsewhere runs in the page, and nothing is kept."""

STATUSES: dict[type[OfframpError], int] = {
    ConfigError: 400,
    PolicyRefusedError: 409,
    PromoteConflictError: 409,
    RegistryUnavailableError: 503,
}
"""Status by error; others are 500."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Login(_Body):
    """The key that opens a session."""

    key: str = Field(max_length=256)


class Promotion(_Body):
    """What to promote; with ``percent``, as a canary.

    Attributes:
        generation: A published generation; None: the canary's policy, or the newest.
        percent: Share of the requests; None: all of them.
        expected: The generation promoted last, as the operator saw it; None: whichever it is.
    """

    generation: int | None = Field(default=None, ge=1)
    percent: float | None = Field(default=None, ge=0, le=100)
    expected: int | None = Field(default=None, ge=0)


class RollingBack(_Body):
    """What to return to.

    Attributes:
        to: A generation; None: the last good one.
        expected: The generation promoted last, as the operator saw it; None: whichever it is.
    """

    to: int | None = Field(default=None, ge=1)
    expected: int | None = Field(default=None, ge=0)


class Operations:
    """Does what ``offramp promote`` and ``rollback`` do, one at a time.

    Args:
        registry: Where workers look.
        settings: Name home folder and channel.
    """

    def __init__(self, registry: PolicyRegistry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._turn = threading.Lock()

    def promote(self, wish: Promotion) -> None:
        """Promote a release, or let it serve a share of the requests."""
        if wish.generation is None and wish.percent is None:
            raise ConfigError("generation", "is missing", "Name one, or give percent")
        with self._turn:
            publisher = self._publisher(wish.expected)
            if wish.percent is not None:
                publisher.roll_out(wish.percent, wish.generation)
            elif wish.generation is not None:
                publisher.promote(wish.generation)

    def roll_back(self, wish: RollingBack) -> None:
        """Serve an older policy again."""
        with self._turn:
            self._publisher(wish.expected).rollback(wish.to)

    def _publisher(self, expected: int | None) -> Any:
        if not (self._settings.home / KEY).exists():
            remedy = "Run the command where the key lies"
            raise ConfigError("key", f"{self._settings.home / KEY} is not here", remedy)
        publisher = open_publisher(self._settings, self._registry)
        if expected is not None and expected != publisher.promoted:
            raise PromoteConflictError(expected, publisher.promoted, "the head moved")
        return publisher


def create_console(registry: PolicyRegistry, settings: Settings, key: str) -> FastAPI:
    """The console of one channel.

    Args:
        registry: Where workers look.
        settings: Name home folder and channel.
        key: What operators must present.
    """
    app = FastAPI(title="offramp console", docs_url=None, redoc_url=None, openapi_url=None)
    doors = Doors(key)

    @app.middleware("http")
    async def add_headers(request: Request, call: Any) -> Response:
        reply: Response = await call(request)
        reply.headers.update(HEADERS)
        return reply

    @app.exception_handler(OfframpError)
    def fail(_: Request, error: OfframpError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, STATUSES.get(type(error), 500))

    @app.exception_handler(HTTPException)
    def refuse(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    _add_sessions(app, doors)
    _add_pages(app, doors, registry, settings)
    _add_api(app, doors, registry, settings)
    return app


def _add_sessions(app: FastAPI, doors: Doors) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/assets/{name}")
    def asset(name: str) -> Response:
        kinds = {"console.css": "text/css", "console.js": "text/javascript"}
        if name not in kinds:
            raise HTTPException(404, "no such asset")
        return Response((HERE / name).read_bytes(), media_type=kinds[name])

    @app.post("/session")
    def log_in(login: Login, request: Request) -> Response:
        token = doors.open(login.key) if is_own_page(request) else None
        if token is None:
            raise HTTPException(401, "that is not the console's key")
        reply = Response(status_code=204)
        is_https = request.url.scheme == "https"
        reply.set_cookie(
            COOKIE, token, int(SESSION_S), httponly=True, samesite="strict", secure=is_https
        )
        return reply

    @app.delete("/session", dependencies=[Depends(doors.require)])
    def log_out(request: Request) -> Response:
        doors.close(request.cookies.get(COOKIE, ""))
        reply = Response(status_code=204)
        reply.delete_cookie(COOKIE)
        return reply


def _add_pages(app: FastAPI, doors: Doors, registry: PolicyRegistry, settings: Settings) -> None:
    pages = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    pages.globals.update(columns=COLUMNS, columns_of_tracks=COLUMNS_OF_TRACKS, missing=NOT_REPORTED)
    pages.globals.update(points_of=points_of, **PICTURE)

    def page(name: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(pages.get_template(name).render(channel=settings.channel, **values))

    @app.get("/login")
    def show_login() -> HTMLResponse:
        return page("login.html")

    @app.get("/")
    def show_console(request: Request) -> Response:
        if not doors.knows(request):
            return RedirectResponse("/login", 303)
        return page("console.html", view=view_channel(registry, settings))

    @app.get("/panel", dependencies=[Depends(doors.require)])
    def show_panel() -> HTMLResponse:
        return page("panel.html", view=view_channel(registry, settings))

    @app.get("/confirm/{action}")
    def confirm(
        request: Request,
        action: str,
        generation: Annotated[int | None, Query(ge=1)] = None,
        percent: Annotated[float | None, Query(ge=0, le=100)] = None,
    ) -> Response:
        if not doors.knows(request):
            return RedirectResponse("/login", 303)
        if action not in ("promote", "rollback"):
            raise HTTPException(404, "no such action")
        promoted = open_ledger(settings).promoted()
        rows = differences(settings, promoted, generation) if promoted and generation else []
        wish = {"to" if action == "rollback" else "generation": generation, "expected": promoted}
        if percent is not None:
            wish["percent"] = percent  # type: ignore[assignment]  # a share may have decimals
        return page(
            "confirm.html", action=action, generation=generation, percent=percent,
            promoted=promoted, rows=rows, wish=json.dumps(wish),
        )  # fmt: skip


def _add_api(app: FastAPI, doors: Doors, registry: PolicyRegistry, settings: Settings) -> None:
    operations = Operations(registry, settings)
    guarded = {"dependencies": [Depends(doors.require)]}

    @app.get("/api/status", **guarded)  # type: ignore[arg-type]  # keywords of several types
    def status() -> dict[str, Any]:
        view = view_channel(registry, settings)
        return {
            "channel": view.channel,
            "state": view.state,
            "head": view.head,
            "trouble": view.trouble,
            "promoted": view.promoted,
            "workers": [asdict(ack) for ack in view.workers],
        }

    @app.get("/api/history", **guarded)  # type: ignore[arg-type]
    def history() -> list[dict[str, str]]:
        releases = past_releases(settings)
        return [dict(zip(COLUMNS, each.cells, strict=True)) for each in releases]

    @app.get("/api/diff", **guarded)  # type: ignore[arg-type]
    def diff(old: Annotated[int, Query(ge=1)], new: Annotated[int, Query(ge=1)]) -> list[Any]:
        rows = differences(settings, old, new)
        return [dict(zip(("field", "old", "new"), row, strict=True)) for row in rows]

    @app.post("/api/promote", **guarded)  # type: ignore[arg-type]
    def promote(wish: Promotion) -> dict[str, int]:
        operations.promote(wish)
        return {"promoted": open_ledger(settings).promoted()}

    @app.post("/api/rollback", **guarded)  # type: ignore[arg-type]
    def roll_back(wish: RollingBack) -> dict[str, int]:
        operations.roll_back(wish)
        return {"promoted": open_ledger(settings).promoted()}

    @app.get("/api/events", **guarded)  # type: ignore[arg-type]
    def events(request: Request) -> StreamingResponse:
        seen = request.headers.get("last-event-id", "")
        since = int(seen) if seen.isdecimal() and len(seen) < 19 else 0
        return StreamingResponse(follow(registry, since), media_type="text/event-stream")


async def follow(registry: PolicyRegistry, since: int) -> AsyncIterator[str]:
    """Server-sent events: each promotion above a generation, and whether the registry answers."""
    was_there = True
    while True:
        try:
            latest = await asyncio.to_thread(registry.events, EVENTS)
        except OfframpError as error:
            yield _event("trouble", {"error": str(error)}) if was_there else ": away\n\n"
            was_there = False
        else:
            yield ": there\n\n" if was_there else _event("back", {})
            was_there = True
            for each in reversed([each for each in latest if each.generation > since]):
                since = each.generation
                yield f"id: {since}\n" + _event("promotion", asdict(each))
        await asyncio.sleep(EVERY_S)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
