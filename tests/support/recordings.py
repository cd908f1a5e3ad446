"""A small corpus whose documents fall into every split, and a recording as commands find it.

The recording is the reference model's, with invented features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from offramp.agents.recording.corpus import load_corpus, tokenize
from offramp.agents.recording.documents import Document
from offramp.agents.recording.training_data import COSTS, save_facts
from offramp.controller.costs.cost_file import save_costs
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.traces.candidate_file import save_candidates
from offramp.envs.traces.store import TraceStore
from offramp.worker.model.loading import load_model, model_fingerprint
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.spec import ModelFacts
from support.cost_tables import measured
from support.models import REFERENCE

EXITS = (3, 6, 9)
LAYERS, VOCAB = 12, 4096
DOCUMENTS = 24


def make_corpus(folder: Path, documents: int = DOCUMENTS) -> Path:
    """Python-like texts of 2,000 characters or more, each its own."""
    folder.mkdir(parents=True)
    for number in range(documents):
        lines = [
            f"def name_{number}_{line}(value: int) -> int:\n    return value * {line} + {number}\n"
            for line in range(36)
        ]
        (folder / f"{number}.py").write_text("\n".join(lines))
    return folder


def make_recording(folder: Path, corpus: Path, tokens: int = 120) -> Path:
    """Traces of a corpus's training and validation documents, with costs, facts, candidates."""
    fingerprint = model_fingerprint(load_model(REFERENCE, torch.float32, "cpu"))
    header = TraceHeader(model=fingerprint, schema=CANDIDATES_V1.digest, exits=EXITS, layers=LAYERS)
    store = TraceStore.create(folder, header)
    documents = load_corpus(corpus)
    for number, document in enumerate(documents):
        if document.split != "test":
            store.append(_chunk(document, tokens, number), document.split)
    read = [ids for _, ids in tokenize(str(REFERENCE), documents)]
    save_candidates(folder, successor_table(read, VOCAB, 16))
    facts = ModelFacts(
        model=fingerprint, tokenizer="cd", layers=LAYERS, vocab=VOCAB, context=512, width=256
    )
    save_facts(folder, facts)
    save_costs(folder / COSTS, measured(model=fingerprint))
    return folder


def _chunk(document: Document, tokens: int, seed: int) -> TraceChunk:
    rng = np.random.default_rng(seed)
    shape = (tokens, len(EXITS))
    ease_TE = rng.normal(size=(tokens, 1)) + np.asarray([-0.5, 0.3, 1.0])
    features_TEF = rng.normal(size=(*shape, CANDIDATES_V1.width)).astype(np.float32)
    features_TEF[:, :, 0] = ease_TE
    features_TEF[:, :, CANDIDATES_V1.index("depth")] = np.asarray(EXITS) / LAYERS
    features_TEF[:, :, CANDIDATES_V1.index("run_length")] = 0
    return TraceChunk(
        document=document.digest,
        position_T=np.arange(tokens, dtype=np.int32),
        features_TEF=features_TEF,
        softmax_TES=rng.random((*shape, 3), dtype=np.float32),
        exit_token_TE=(ease_TE + 0.5 * rng.normal(size=shape) < 0).astype(np.int32),
        full_token_T=np.zeros(tokens, np.int32),
        next_token_T=np.zeros(tokens, np.int32),
        gap_TE=np.zeros(shape, np.float32),
    )
