"""More work than a pool can do: who is served, how soon the others are told, and what is left."""

from __future__ import annotations

import time

from serving.crowd import at_once
from serving.serve_rows import ServeRow, p50, p99, row
from serving.served_process import ServerProcess
from serving.steady_state import prompts
from serving.stream_client import Streamed, asked, closed_loop, open_loop

TOKENS = 32
CROWD = 400
"""Requests that arrive at once."""


async def overloaded(server: ServerProcess, room: int, seconds: float) -> list[ServeRow]:
    """Rows of a pool that is asked for five times what it can do.

    Args:
        server: A pool of one worker.
        room: Requests that it takes at a time.
        seconds: How long it is asked too much.
    """
    await server.client.stream(_body(0))  # warms up
    saturated = await closed_loop(server.client, [_body(n) for n in range(6 * room)], room)
    peak = _goodput(saturated)
    calm_s = [_took(await server.client.stream(_body(n))) for n in range(5)]
    rate = 5 * peak / TOKENS
    found = await open_loop(lambda n: server.client.stream(_body(n)), rate, seconds)
    over_s = time.perf_counter()
    served = [each for each in found if each.status == 200]
    refused = [each for each in found if each.is_refused]
    back_s = await _recovered(server, over_s, 2 * p50(calm_s) / 1e3)
    unaccounted = sum(not (each.is_good or each.is_refused or each.is_told) for each in found)
    return [
        row("saturated: time to the last token, p99", room, p99(list(map(_took, saturated))), "ms"),
        row(
            "5x overload: the same of those accepted",
            round(rate * seconds),
            p99(list(map(_took, served))),
            "ms",
            p99(list(map(_took, saturated))),
        ),
        row("5x overload: refusals", round(rate * seconds), len(refused), "requests"),
        row("5x overload: refused within, p50", round(rate * seconds), p50(_told(refused)), "ms"),
        row("5x overload: refused within, p99", round(rate * seconds), p99(_told(refused)), "ms"),
        row("5x overload: good tokens", round(rate * seconds), _goodput(found), "tokens/s", peak),
        row("5x overload: not accounted for", round(rate * seconds), unaccounted, "requests"),
        row("5x overload: a request within twice the calm time again after", 0, back_s, "s"),
    ]


async def crowded(server: ServerProcess) -> list[ServeRow]:
    """Rows of requests that arrive at once, over connections that are open already."""
    found = await at_once(server.client, [_body(number) for number in range(CROWD)])
    refused = [each for each in found if each.is_refused]
    good = sum(each.is_good for each in found)
    return [
        row("400 at once: refused within, p50", CROWD, p50(_told(refused)), "ms"),
        row("400 at once: refused within, p99", CROWD, p99(_told(refused)), "ms"),
        row("400 at once: served whole or refused", CROWD, good + len(refused), "requests", CROWD),
    ]


def _body(number: int) -> dict[str, object]:
    return asked(prompts(1, seed=number)[0], TOKENS)


def _took(streamed: Streamed) -> float:
    return streamed.ended_s - streamed.sent_s


def _told(refused: list[Streamed]) -> list[float]:
    return [each.told_s - each.sent_s for each in refused]


def _goodput(found: list[Streamed]) -> float:
    good = [each for each in found if each.is_good]
    began_s = min(each.sent_s for each in good)
    return sum(each.wanted for each in good) / (max(each.ended_s for each in good) - began_s)


async def _recovered(server: ServerProcess, since_s: float, calm_s: float) -> float:
    """Seconds until a request takes hardly longer than one did before."""
    for number in range(1000):
        streamed = await server.client.stream(_body(number))
        if streamed.is_good and _took(streamed) <= calm_s:
            return streamed.sent_s - since_s
    return float("nan")
