"""Learn to draft for one model on this machine, and save the drafter as a bundle.

    python examples/learn_to_draft.py models/reference runs/drafter

Lossless: in ``verify`` the output is full depth's whatever the drafter does. It is headless: a
draft is the best of the candidates that the model itself says after each token. Costs are measured
here, so train again on another machine. `docs/lossless.md` has the method and the numbers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from typer import Argument, Option

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_export import router_of
from offramp.agents.drafting.draft_ppo import DraftPPOConfig, train_drafter
from offramp.agents.drafting.draft_replay import replay_drafts
from offramp.agents.recording.corpus import Document, load_corpus
from offramp.agents.recording.record import tokenize
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.policies.weights import pack_policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig

PROMPT = 64
CANNED_ROWS = 64


def main(
    model: Annotated[str, Argument(help="Folder of the model.")],
    out: Annotated[Path, Argument(help="Folder for the bundle.")],
    exits: Annotated[str, Option(help="Layers to ask after.")] = "2,3,5,6",
    documents: Annotated[int, Option(help="Of the standard library.")] = 320,
    new_tokens: Annotated[int, Option(help="Continued in each.")] = 192,
    candidates: Annotated[int, Option(help="Per token.")] = 64,
    steps: Annotated[int, Option(help="Decisions of training.")] = 1_500_000,
    profile_s: Annotated[float, Option(help="Seconds of measuring costs.")] = 60.0,
    seed: Annotated[int, Option(help="Of training.")] = 0,
) -> None:
    """Record, measure, train, save, and compare with full depth."""
    torch.set_num_threads(1)
    layers = tuple(int(layer) for layer in exits.split(","))
    many = AdaptiveEngine.from_pretrained(model, slots=16)
    alone = AdaptiveEngine(many.model, many.tokenizer, slots=1)
    train, held_out = documents_of(model, documents)
    table_VK = successor_table(spoken(many, train, new_tokens), many.stack.vocab, candidates)
    wanted = Continuations(exits=layers, prompt_tokens=PROMPT, new_tokens=new_tokens)
    traces = record_continuations(many, train, wanted, candidates_VK=table_VK)
    costs = measure_costs(alone, table_VK, ProfileConfig(rows=(1,), limit_s=profile_s)).costs
    config = DraftPPOConfig(steps=steps, seed=seed)
    drafter = router_of(train_drafter(traces, costs, config), layers, config.max_pending, table_VK)
    offline = replay_drafts(drafter, traces, costs)
    rows_NF = traces.features_NEF.reshape(-1, traces.features_NEF.shape[2])[:CANNED_ROWS]
    bundle = PolicyBundle.draft(
        pack_policy(drafter, rows_NF),
        model=many.model_fingerprint,
        tokenizer=many.tokenizer_fingerprint,
        training={"seed": seed, "steps": steps, "exits": list(layers)},
        metrics={"offline_speedup": offline.rate},
        created_at=time.time(),
    )
    bundle.save(out)
    prompts = [tokens[:PROMPT] for _, tokens in held_out]
    full_s, mine_s = seconds(alone, prompts, NeverExit()), seconds(alone, prompts, bundle.policy())
    print(f"{out}: {full_s / mine_s:.2f} times full depth on {len(prompts)} validation documents")


def documents_of(model: str, limit: int) -> list[list[tuple[Document, list[int]]]]:
    """Training documents, and ten validation documents, that are longer than a prompt."""
    pairs = tokenize(model, load_corpus(None, limit=limit))
    longer = [(document, tokens) for document, tokens in pairs if len(tokens) > PROMPT]
    train = [pair for pair in longer if pair[0].split == "train"]
    return [train, [pair for pair in longer if pair[0].split == "validation"][:10]]


def spoken(
    engine: AdaptiveEngine, documents: list[tuple[Document, list[int]]], new_tokens: int
) -> list[list[int]]:
    """The documents' beginnings as the model goes on with them."""
    prompts = [tokens[:PROMPT] for _, tokens in documents]
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    done = engine.generate(prompts, sampling, NeverExit())
    return [[*prompt, *each.token_ids] for prompt, each in zip(prompts, done, strict=True)]


def seconds(engine: AdaptiveEngine, prompts: list[list[int]], policy: Policy) -> float:
    """Median of three runs over all prompts, one after the other."""
    sampling = SamplingParams(max_tokens=64, ignore_eos=True)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        for prompt in prompts:
            engine.generate([prompt], sampling, policy, kv_mode="verify")
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


if __name__ == "__main__":
    typer.run(main)
