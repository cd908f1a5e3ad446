"""Train policies for a classification: read the texts, learn, place, and save, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from offramp.agents.classifying.class_policies import (
    AGENT,
    LOSS,
    ClassFamily,
    ClassPolicy,
    learn_families,
    place_families,
)
from offramp.agents.classifying.classify_config import HEADS
from offramp.agents.classifying.cross_fitting import cross_fitted_traces
from offramp.agents.classifying.exit_states import exit_states
from offramp.agents.classifying.head_task import three_ways
from offramp.agents.classifying.labelled_texts import (
    TEXT,
    LabelledTexts,
    encoded,
    known_texts,
    read_labelled,
    save_texts,
    unknown_among,
)
from offramp.agents.classifying.sequence_traces import read_texts, sequence_traces
from offramp.agents.placing.contenders import CHOSEN, Contender, canned_rows, save_policies
from offramp.controller.adapters.adapter_folder import (
    HEADS_KIND,
    OF_HEADS,
    keep_adapters,
    read_description,
)
from offramp.controller.errors import ConfigError
from offramp.controller.release.bundle import PolicyBundle
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_costs import measure_costs
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.model.loading import parse_dtype

PLACED_AT = (0.0, 0.0025, LOSS, 0.01, 0.02)
"""Losses of accuracy at which each family is placed; ``LOSS`` decides which is chosen."""

TIMED = 64
"""Texts that the parts of a classification are timed on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTrainConfig:
    """How policies learn to classify.

    Attributes:
        model: Folder of the model.
        heads: Folder that ``offramp tune --task classify`` wrote for it.
        data: File of texts with labels: the one that the heads were fitted to, or another.
        text_field: Name of the field that holds the text.
        label_field: Name of the field that holds the label; "" is the only other one.
        steps: Environment steps of PPO; 0 leaves it out.
        dtype: Number format of the weights.
        device: Device that the model runs on.
        threads: Torch threads.
        seed: Seeds the parts of the texts and what is learned.
    """

    model: str
    heads: Path
    data: Path
    text_field: str = TEXT
    label_field: str = ""
    steps: int = AGENT.steps
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTraining:
    """What training came to.

    Attributes:
        placed: Every saved policy as replay finds it on the texts that settings were chosen on.
        chosen: The cheapest of those that lose ``LOSS`` at most.
        learned: Texts that were learned from.
        measured: Texts that settings were chosen on.
    """

    placed: tuple[ClassPolicy, ...]
    chosen: ClassPolicy
    learned: int
    measured: int


def train_classes(
    config: ClassTrainConfig, out: Path, on_progress: Callable[[str, int, int], None]
) -> ClassTraining:
    """Learn policies of a classification, place them, and save them as bundles.

    Args:
        config: What is learned from what.
        out: Folder of the policies.
        on_progress: Told (stage, done, in all) as texts are read and heads are fitted anew.

    Raises:
        ModelError, ConfigError: the model, or the heads, cannot be used, or are of each other not.
        TraceError: the data are unusable, or hold a label that the heads do not know.
    """
    torch.set_num_threads(config.threads)
    texts = read_labelled(config.data, config.text_field, config.label_field)
    model = SequenceModel.load(config.model, parse_dtype(config.dtype), config.device)
    classifier = model.classifier(config.heads)
    texts.indices(classifier.heads.labels)  # refused before states take minutes
    sequences = encoded(model, texts)
    traces = unseen_traces(config, model, classifier, texts, sequences, on_progress)
    fit, choose = halves(traces, config.seed)
    costs = measure_costs(classifier, sequences[:TIMED])
    agent = replace(AGENT, steps=config.steps) if config.steps else None
    families = learn_families(fit, costs, seed=config.seed, agent=agent)
    placed: dict[tuple[str, float | None], ClassPolicy] = {}
    for loss in PLACED_AT:
        for each in place_families(families, choose, costs, loss):
            placed.setdefault((each.family, each.setting), each)
    chosen = min(place_families(families, choose, costs), key=lambda each: each.cost)
    _save(config, out, model, classifier, families, list(placed.values()), chosen, choose)
    save_texts(out, texts)
    keep_adapters(config.heads, out)
    return ClassTraining(
        placed=tuple(placed.values()), chosen=chosen, learned=len(fit), measured=len(choose)
    )


def unseen_traces(
    config: ClassTrainConfig,
    model: SequenceModel,
    classifier: Classifier,
    texts: LabelledTexts,
    sequences: Sequence[Sequence[int]],
    on_progress: Callable[[str, int, int], None],
) -> TokenTraces:
    """Traces of texts as heads see them that were not fitted to them: others, if need be."""
    heads, facts = classifier.heads, read_description(config.heads, OF_HEADS)
    is_same = facts.get("data") == texts.digest
    if is_same and facts.get("fit", HEADS) != HEADS:
        # Nothing is fitted anew without a part of the texts where a model, or gates, were along.
        places = np.concatenate(three_ways(texts, facts["held_out"], facts["seed"])[1:])
        is_same = False
    elif is_same:
        places = np.arange(len(texts))
    else:
        places = unknown_among(texts, known_texts(config.heads))
    if not len(places):
        raise ConfigError("data", "holds no text that the heads do not know", "Give others")
    texts, sequences = texts.of(places), [sequences[place] for place in places.tolist()]
    states_NED = exit_states(
        model.stack, sequences, heads.exits, heads.pool,
        on_progress=lambda done, total: on_progress("states", done, total),
    )  # fmt: skip
    read = read_texts(model, texts, sequences)
    if not is_same:
        return sequence_traces(heads, states_NED, read)
    return cross_fitted_traces(
        heads, states_NED, read, config.seed, lambda *count: on_progress("heads", *count)
    )


def halves(traces: TokenTraces, seed: int) -> tuple[TokenTraces, TokenTraces]:
    """Texts to learn from, and as many to choose settings on; equal texts lie in one half."""
    order = np.random.default_rng(seed).permutation(len(traces.documents))
    cut = len(order) // 2
    if not cut:
        raise ConfigError("data", "holds fewer than two texts", "Give more")
    first, second = (
        {traces.documents[place] for place in part.tolist()} for part in (order[:cut], order[cut:])
    )
    return traces.select(first), traces.select(second)


def _save(
    config: ClassTrainConfig,
    out: Path,
    model: SequenceModel,
    classifier: Classifier,
    families: Sequence[ClassFamily],
    placed: Sequence[ClassPolicy],
    chosen: ClassPolicy,
    choose: TokenTraces,
) -> None:
    """Write a bundle per policy, and the chosen one apart."""
    symbols = {each.name: each.symbol for each in families}
    asked = {name: value for name, value in asdict(config).items() if name not in ("heads", "data")}
    asked |= {"task": HEADS_KIND, "labels": list(classifier.heads.labels), "texts": len(choose)}
    save_policies(
        out,
        [
            Contender(
                family=each.family,
                setting=each.setting,
                offline_agreement=each.accuracy,
                policy=each.policy,
                offline_cost=each.cost,
                symbol=symbols.get(each.family, "τ="),
            )
            for each in placed
        ],
        asked,
        lambda policy: canned_rows(policy, choose),
        (model.fingerprint, model.tokenizer_fingerprint),
        adapters=classifier.heads.digest,
    )
    number = [(each.family, each.setting) for each in placed].index((chosen.family, chosen.setting))
    PolicyBundle.load(out / f"{number:02d}").save(out / CHOSEN)
