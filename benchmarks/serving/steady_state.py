"""What serving adds to the bare engine: by token, to the first token, and where it is saturated.

The bare engine runs in this process, on as many threads as the pool's worker, in turns with it. A
relay tells what of it a front in Python hardly saves.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import psutil
from serving.relay import relay_cpu_s
from serving.serve_rows import ServeRow, p50, paired
from serving.served_process import ServerProcess, cpu_s
from serving.stream_client import Streamed, asked, closed_loop

from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine, SamplingParams

PROMPT_TOKENS = 64


@dataclass
class ServingRun:
    """What one run of some requests gave, bare or served.

    Attributes:
        first_s: Seconds to the first token of each.
        gaps_s: Seconds between neighbouring tokens, all requests together.
        tokens: Tokens in all.
        wall_s: Seconds from the first request to the last token.
        cpu_s: Processor seconds, the client's own left out: of what a token passes through.
        all_cpu_s: The same of all processes of the pool.
    """

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    all_cpu_s: float = 0.0


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, none of them twice the same prompt: no cache of prompts can help."""
    drawn = np.random.default_rng(seed).integers(1, 4096, size=(count, PROMPT_TOKENS))
    return [list(map(int, each)) for each in drawn]


def bare(engine: AdaptiveEngine, requests: list[list[int]], tokens: int) -> ServingRun:
    """The requests at once, in the engine alone; text and finish reasons are made as ever."""
    run, told = ServingRun(), defaultdict(list)
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    cpu, began_s = time.process_time(), time.perf_counter()
    for prompt in requests:
        engine.submit(prompt, sampling, NeverExit())
    while engine.load != (0, 0):
        events = engine.step()
        now_s = time.perf_counter()
        for event in events:
            told[event.request_id].append(now_s)
    run.wall_s = time.perf_counter() - began_s
    run.cpu_s = time.process_time() - cpu
    for times in told.values():
        run.first_s.append(times[0] - began_s)
        run.gaps_s += np.diff(times).tolist()
        run.tokens += len(times)
    return run


async def through(
    server: ServerProcess, requests: list[list[int]], tokens: int, together: int
) -> tuple[ServingRun, list[Streamed]]:
    """The same through a pool, so many at a time."""
    run, speakers, family = ServingRun(), server.speakers(), server.family()
    before, all_before, began_s = cpu_s(speakers), cpu_s(family), time.perf_counter()
    bodies = [asked(prompt, tokens) for prompt in requests]
    found = await closed_loop(server.client, bodies, together)
    run.wall_s = max(each.token_s[-1] for each in found if each.token_s) - began_s
    run.cpu_s = cpu_s(speakers) - before
    run.all_cpu_s = cpu_s(family) - all_before
    for each in found:
        if not each.is_good:
            raise RuntimeError(f"a stream of an idle pool was not whole: {each}")
        run.first_s.append(each.token_s[0] - each.sent_s)
        run.gaps_s += each.gaps_s
        run.tokens += len(each.token_s)
    return run, found


async def steady(
    server: ServerProcess, engine: AdaptiveEngine, rounds: int, tokens: int
) -> list[ServeRow]:
    """Rows for one stream and for eight, and for a pool that is saturated."""
    rows: list[ServeRow] = []
    for streams in (1, 8):
        repeats = 4 if streams == 1 else 1  # as much work as several streams are
        pairs = []
        for number in range(rounds + 1):
            requests = prompts(streams * repeats, seed=number)
            alone = ServingRun()
            for at in range(0, len(requests), streams):
                _add(alone, bare(engine, requests[at : at + streams], tokens))
            pooled, _ = await through(server, requests, tokens, streams)
            if number:  # the first warms up
                pairs.append((pooled, alone))
        rows += _latency(streams, pairs)
        rows.append(await relayed(streams, [alone for _, alone in pairs]))
    return [*rows, await _saturated(server, engine, rounds, tokens)]


def _add(whole: ServingRun, part: ServingRun) -> None:
    whole.first_s += part.first_s
    whole.gaps_s += part.gaps_s
    whole.tokens += part.tokens
    whole.wall_s += part.wall_s
    whole.cpu_s += part.cpu_s


def _latency(streams: int, pairs: list[tuple[ServingRun, ServingRun]]) -> list[ServeRow]:
    ours, theirs = zip(*pairs, strict=True)
    alone_ms = [each.cpu_s / each.tokens * 1e3 for each in theirs]
    return [
        paired(
            "inter-token p50",
            streams,
            [p50(each.gaps_s) for each in ours],
            [p50(each.gaps_s) for each in theirs],
            "ms",
        ),
        paired(
            "CPU per token, front and worker",
            streams,
            [each.cpu_s / each.tokens * 1e3 for each in ours],
            alone_ms,
            "ms",
        ),
        paired(
            "CPU per token, all of the pool's processes",
            streams,
            [each.all_cpu_s / each.tokens * 1e3 for each in ours],
            alone_ms,
            "ms",
        ),
        paired(
            "time to first token p50",
            streams,
            [p50(each.first_s) for each in ours],
            [p50(each.first_s) for each in theirs],
            "ms",
        ),
    ]


async def relayed(streams: int, alone: list[ServingRun]) -> ServeRow:
    """The bare engine's processor time a token and a relay's, over the bare engine's."""
    step_s = float(np.median([gap_s for each in alone for gap_s in each.gaps_s]))
    relay_ms = await relay_cpu_s(streams, step_s) * 1e3
    alone_ms = [each.cpu_s / each.tokens * 1e3 for each in alone]
    with_relay = [each + relay_ms for each in alone_ms]
    return paired("CPU per token, the bare engine and a relay", streams, with_relay, alone_ms, "ms")


async def _saturated(
    server: ServerProcess, engine: AdaptiveEngine, rounds: int, tokens: int
) -> ServeRow:
    """Three times as many requests as slots; the bare engine has them all in line at once."""
    ours, theirs = [], []
    for number in range(rounds):
        requests = prompts(24, seed=100 + number)
        alone = bare(engine, requests, tokens)
        pooled, _ = await through(server, requests, tokens, 16)
        ours.append(pooled.tokens / pooled.wall_s)
        theirs.append(alone.tokens / alone.wall_s)
    return paired("throughput, saturated", 16, ours, theirs, "tokens/s")


async def settle(server: ServerProcess) -> None:
    """Wait until a pool that has just started does nothing more."""
    await server.idle()
    while True:
        before = cpu_s(server.family())
        await asyncio.sleep(1.0)
        if cpu_s(server.family()) - before < 0.5 * (psutil.cpu_count() or 1):
            return
