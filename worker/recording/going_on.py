"""Lets a model go on from prompts at full depth: the text that lossless decoding emits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from offramp.controller.policies.protocols import NeverExit
from offramp.worker.decoding.request import Request
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine


def go_on(
    engine: AdaptiveEngine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float = 0.0,
    *,
    seeds: Sequence[int] = (),
    ignore_eos: bool = False,
) -> list[list[int]]:
    """The tokens that follow each prompt, the one that ends it included.

    Args:
        engine: Idle; its slots go on from as many prompts at a time.
        prompts: Token ids of each.
        new_tokens: Most tokens that follow one.
        temperature: 0 is greedy.
        seeds: Seed each prompt's own generator, so that its text depends on no neighbour; () if
            nothing is drawn.
        ignore_eos: Whether to go on past the end of a text.

    Raises:
        RequestError: a prompt or temperature that cannot be served.
    """
    sampling = SamplingParams(
        max_tokens=new_tokens, temperature=temperature, seed=0, ignore_eos=ignore_eos
    )
    requests: list[Request] = []
    try:
        for number, prompt in enumerate(prompts):
            own = replace(sampling, seed=seeds[number]) if seeds else sampling
            requests.append(engine.submit(list(prompt), own, NeverExit(), kv_mode="project"))
        found: dict[str, list[int]] = {request.id: [] for request in requests}
        for event in engine.follow(requests):
            found[event.request_id].append(event.token)
    except BaseException:
        for request in requests:
            engine.cancel(request.id)
        raise
    return list(found.values())
