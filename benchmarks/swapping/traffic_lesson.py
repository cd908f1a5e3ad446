"""What the changing traffic is made of, and the policy that it begins with: learned on code alone.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.training_data import COSTS, save_facts
from offramp.agents.retraining.learning_state import split_live
from offramp.agents.retraining.retrain_config import RetrainConfig
from offramp.agents.retraining.round_lesson import certify_round
from offramp.agents.training.train import train
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.costs.cost_file import save_costs
from offramp.controller.costs.prices import PARTS
from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.candidate_file import save_candidates
from offramp.envs.traces.store import TraceStore
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.recording.going_on import go_on
from offramp.worker.recording.recording_actor import TraceRecorder
from offramp.worker.spec import WorkerSpec, describe

EXITS = (3, 6, 9)
PROMPT_TOKENS, TOKENS = 24, 17
LEAST_TOKENS = 3 * PROMPT_TOKENS
"""Texts are long enough to be cut in their middle."""

DOCUMENTS = 240
CANDIDATES = 16
TEMPERATURE = 1.0
DELTA = 0.1

NEXT_TO_NOTHING = 1e-3


def prompts_of(tokenizer: Any) -> dict[str, list[list[int]]]:
    """The last tokens before the middle of each text that is long enough, by sort of text.

    After its end the model would begin a new text, which is code whatever came before.
    """
    prose = "\n".join(path.read_text("utf-8") for path in sorted(Path("docs").glob("*.md")))
    texts = {
        "code": [each.text for each in load_corpus(None, limit=600)],
        "prose": [each for each in prose.split("\n") if each and each[0] not in "|#"],
    }
    found = {}
    for name, each_kind in texts.items():
        tokens = [tokenizer.encode(each[:3000]) for each in each_kind]
        long = [each for each in tokens if len(each) >= LEAST_TOKENS]
        found[name] = [each[len(each) // 2 - PROMPT_TOKENS : len(each) // 2] for each in long]
    return found


def learn_code(
    spec: WorkerSpec, prompts: Sequence[Sequence[int]], config: RetrainConfig
) -> PolicyBundle:
    """Record what the model says after code, train p̂ on it, and certify it."""
    recorder, traces = TraceRecorder(spec), config.traces
    prompts = prompts[:DOCUMENTS]
    seeds = range(len(prompts))
    said = go_on(recorder.engine, prompts, TOKENS, TEMPERATURE, seeds=seeds, ignore_eos=True)
    texts = [[*prompt, *rest] for prompt, rest in zip(prompts, said, strict=True)]
    facts = describe(recorder.engine)
    table_VK = successor_table(texts, facts.vocab, CANDIDATES)
    header = TraceHeader(
        model=facts.model, schema=CANDIDATES_V1.digest, exits=EXITS, layers=facts.layers
    )
    store = TraceStore.create(traces, header)
    recorder.prepare(EXITS, table_VK)
    for number, tokens in enumerate(texts):
        name = f"{number:064x}"
        store.append(recorder.record(name, tokens, PROMPT_TOKENS), split_live(name))
    save_candidates(traces, table_VK)
    save_facts(traces, facts)
    save_costs(traces / COSTS, layers_alone(recorder.measure(15.0)))
    # One family whose settings are thresholds, which a worker may move among.
    targets = tuple(1 - share * DELTA for share in (0.25, 0.5, 0.75, 1.0, 1.25))
    policies = config.out / "first"
    train(TrainConfig(traces=str(traces), families=("p̂",), targets=targets, threads=1), policies)
    found = certify_round(config, traces, policies)
    Console(stderr=True).print(found.story)
    assert found.bundle is not None, found.story
    return found.bundle


def layers_alone(costs: CostTable) -> CostTable:
    """A table in which layers alone cost anything.

    On the reference model preparing a probe takes as long as three layers, and exits hardly save
    time. Priced by layers, which is about what a large model pays, they do.
    """
    for part in set(PARTS) - {"layer"}:
        costs = costs.scaled(part, NEXT_TO_NOTHING)
    return replace(costs, probes={})  # priced as the table's own probe, of the same schema
