"""The console on a real Redis: each state of a channel as its page shows it, and who may act."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import httpx
import pytest

from offramp.controller.release.registry import AckState
from offramp.deploy.console.console_app import follow
from support.console.console_stage import (
    BEARER,
    KEY,
    Photograph,
    Stage,
    canary,
    candidates,
    in_shadow,
    tally,
)

REASON = "generation 2: full depth disagrees with 31.0% or more of what is audited"


def no_release(stage: Stage) -> None:
    """Nothing was published."""


def stable_only(stage: Stage) -> None:
    stage.publish(3)
    stage.say(AckState.ACK, 1, "", tally(1, 4))


def failed_canary(stage: Stage) -> None:
    canary(stage, disagreed=200)


def tripped(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5)
    stage.say(AckState.TRIPPED, 2, REASON)


def rolled_back(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5)
    stage.publisher.rollback()
    stage.say(AckState.ACK, 3)


def redis_gone(stage: Stage) -> None:
    stage.publish(3)
    stage.stop_redis()


STATES: list[tuple[Callable[[Stage], None], list[str], list[str]]] = [
    (no_release, ["no release", "head: none", "No worker reports.", "offramp publish"], ["Roll b"]),
    (stable_only, ["serving", "worker-0-ab", "head: generation 1", "50.0%", "not reported",
      "<td>2 of 5</td>", "6:int4</th><td>12.5%</td>", "3</th><td>37.5%</td>"],
     ["Canary</h2>", "Trips"]),
    (canary, ["canary", "serves 5% of the requests", "0.1% to 4.2%", "Take it to 25%",
              "seconds per token", "38% against generation 1",
              "50% per token against generation 1 (modelled: 3 W)"], ["Trips", "99% of first"]),
    (in_shadow, ["in shadow", "is in shadow: it serves no request", "0.1% to 4.2%",
                 "By the default bounds it <strong class=\"badge passes\">passes</strong>",
                 "Take it to 5%", "a canary in shadow serves no request", "Costs are compared"],
     ["Trips", "Costs: too few", "seconds per token"]),
    (candidates, ["<td>p̂ at 0.4</td><td>disagreement ≤ 5.0%</td><td>1.90%</td>",
                  "6.75 of 12</td><td>on it", "3 (serves)</th>", "p̂ at 0.2", "6.00 of 12",
                  "10.50 of 12</td><td>another is better", "generation 2."],
     ["None was released", "nan"]),
    (failed_canary, ["fails</strong>: full depth disagrees with 4"], ["passes"]),
    (tripped, ["tripped", f"took generation 2 out of service: {REASON}"], ["Canary</h2>"]),
    (rolled_back, ["rolled back", "in place of 2", "generation 3"], ["Trips"]),
    (redis_gone, ["registry unreachable", "Unknown while the registry is away", "uncertified"],
     ["Live"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "said", "unsaid"), STATES, ids=lambda each: getattr(each, "__name__", "")
)
def test_each_state_is_shown(
    stage: Stage, photograph: Photograph, prepare: Callable[[Stage], None], said: list[str],
    unsaid: list[str],
) -> None:  # fmt: skip
    prepare(stage)
    page = stage.page()
    assert [each for each in said if each not in page] == []
    assert [each for each in unsaid if each in page] == []
    assert KEY not in page
    # Links, buttons and fields alone act, in the order in which they stand: a keyboard does.
    assert not re.search("tabindex|onclick|<(a|button|form)[^>]* style=", page)
    assert page.count("<a ") == page.count(' href="/confirm/')
    photograph(prepare.__name__, "/")


def test_nobody_without_the_key_sees_or_does_anything(stage: Stage) -> None:
    stage.publish(3)
    client = stage.client
    assert client.get("/", follow_redirects=False).headers["location"] == "/login"
    for path in ("/panel", "/api/status", "/api/history", "/api/diff?old=1&new=1", "/api/events"):
        assert client.get(path).status_code == 401, path
    for path in ("/api/promote", "/api/rollback"):
        assert client.post(path, json={}).status_code == 401
        assert client.get(path, headers=BEARER).status_code == 405
    wrong = {"Authorization": "Bearer another-key-than-that"}
    assert client.get("/api/status", headers=wrong).status_code == 401
    assert client.get("/health").json() == {"status": "ok"}


def test_a_session_acts_from_its_own_page_alone(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5)
    client, own = stage.client, {"Origin": "http://offramp"}
    assert client.post("/session", json={"key": "no"}, headers=own).status_code == 401
    assert client.post("/session", json={"key": KEY}).status_code == 401
    opened = client.post("/session", json={"key": KEY}, headers=own)
    assert opened.status_code == 204
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert KEY not in cookie
    assert client.get("/").status_code == 200
    for foreign in ({}, {"Origin": "http://offramp:81"}, {"Origin": "null"}):
        assert client.post("/api/rollback", json={}, headers=foreign).status_code == 401
    assert stage.publisher.promoted == 2
    assert client.post("/api/rollback", json={"expected": 2}, headers=own).json() == {"promoted": 3}
    assert client.delete("/session", headers=own).status_code == 204
    assert client.get("/api/status").status_code == 401


def test_the_api_does_what_the_commands_do(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5, promote=False)
    client = stage.client
    client.headers.update(BEARER)
    shown = client.get("/confirm/promote", params={"generation": 2, "percent": 5}).text
    assert "How generation 2 differs from 1" in shown
    shown = client.get("/confirm/promote", params={"generation": 2, "percent": 0}).text
    assert "serve no request, as some are repeated under it unseen" in shown
    assert "Begin a canary in shadow with generation 2" in stage.page()
    wish = {"generation": 2, "percent": 5, "expected": 1}
    assert client.post("/api/promote", json=wish).json() == {"promoted": 3}
    late = client.post("/api/promote", json=wish)
    assert late.status_code == 409
    assert "the head moved" in late.json()["error"]
    assert client.post("/api/promote", json={"percent": 100}).json() == {"promoted": 4}
    assert client.post("/api/promote", json={}).status_code == 400
    assert client.post("/api/promote", json={"generations": 2}).status_code == 422
    assert client.post("/api/rollback", json={"expected": 4}).json() == {"promoted": 5}
    status = client.get("/api/status").json()
    assert (status["state"], status["promoted"]) == ("rolled back", 5)
    assert [each["generation"] for each in client.get("/api/history").json()] == list("54321")
    assert client.get("/api/diff", params={"old": 1, "new": 2}).json()
    (stage.settings.home / "publisher.pem").rename(stage.settings.home / "away.pem")
    refused = client.post("/api/rollback", json={})
    assert refused.status_code == 400
    assert "is not here" in refused.json()["error"]
    assert "this page only shows" in stage.page()


def test_events_are_streamed_as_they_come(stage: Stage) -> None:
    stage.publish(3)

    async def read() -> list[str]:
        stream = follow(stage.registry, 0)
        found = [await anext(stream), await anext(stream)]
        await asyncio.to_thread(stage.publish, 5)
        found += [await anext(stream), await anext(stream)]
        stage.stop_redis()
        found.append(await anext(stream))
        await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
        return found

    found = asyncio.run(read())
    assert found[0] == found[2] == ": there\n\n"
    assert found[1].startswith('id: 1\nevent: promotion\ndata: {"generation": 1, ')
    assert found[3].startswith("id: 2\nevent: promotion\n")
    assert found[4].startswith("event: trouble\n")
    assert stage.client.get("/health").status_code == httpx.codes.OK
