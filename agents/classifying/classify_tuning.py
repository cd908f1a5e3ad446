"""Fit a head per exit, to a frozen model or with it: the whole way, top to bottom.

Shape suffixes: N texts, M texts that are held out, E exits, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from offramp.agents.classifying.classify_config import (
    JOINT,
    MODEL,
    ONLY_WITH,
    ClassifyTuneConfig,
    exits_of_stack,
)
from offramp.agents.classifying.exit_states import STATES, ClassifyCheckpoint, exit_states
from offramp.agents.classifying.head_task import ClassifyReport, HeadTask, OnStage, three_ways
from offramp.agents.classifying.joint_heads import fit_joint
from offramp.agents.classifying.labelled_texts import (
    LabelledTexts,
    encoded,
    read_labelled,
    save_texts,
)
from offramp.agents.classifying.sequence_traces import read_texts, sequence_traces
from offramp.agents.classifying.whole_model import heads_in, train_whole
from offramp.agents.placing.contenders import CHOSEN, Contender, canned_rows, save_policies
from offramp.agents.placing.replay import walk
from offramp.controller.adapters.adapter_folder import DESCRIPTION, HEADS_KIND, KEPT
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.classifying.class_heads import ClassHead
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.sequence_stack import parse_pool
from offramp.worker.model.loading import parse_dtype

GATES = "gates"
"""Folder, beside the heads, of the policy that gates are which were fitted with them."""


def tune_classes(
    config: ClassifyTuneConfig,
    out: Path,
    *,
    resume: bool = False,
    on_progress: OnStage = lambda *_: None,
) -> ClassifyReport:
    """Fit and save a head per exit; the model stays as it is, or a trained one lies beside them.

    Args:
        config: What is fitted to what.
        out: Folder of the heads.
        resume: Go on with the states, or the training, that a run before this one kept there.
        on_progress: Told as states are computed, heads are fitted and the model is trained.

    Raises:
        ModelError: the model cannot be used.
        TraceError: field ``data``; the file is unusable, holds one class only, too few texts of
            them to hold some out, or a text that is empty or over the model's context.
        ConfigError: exits beyond the model, or ``resume`` with other settings.
    """
    torch.set_num_threads(config.threads)
    texts = read_labelled(config.data, config.text_field, config.label_field)
    parts = three_ways(texts, config.held_out, config.seed)  # refused before states take minutes
    model = SequenceModel.load(config.model, parse_dtype(config.dtype), config.device)
    sequences = encoded(model, texts)
    exits = exits_of_stack(model.stack, config.exits)
    pool = parse_pool(config.pool) if config.pool else model.stack.best_pool
    settings = _settings(config, model, texts, exits, pool)
    checkpoint = _begun(out, settings) if resume else ClassifyCheckpoint(settings=settings)
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.save(out)
    task = HeadTask(texts=texts, sequences=sequences, exits=exits, pool=pool, parts=parts)
    gates: MlpPolicy | None = None
    if config.fit == MODEL:
        model, plain, states_MED = _whole(task, model, config, checkpoint, out, on_progress)
    else:
        states_NED = task.states(model, out / STATES, on_progress)
        plain, gates = _frozen(task, model, states_NED, config, on_progress)
        states_MED = states_NED[task.held]
    heads, report = task.finish(plain, states_MED)
    description = {
        **settings,
        "model": model.fingerprint,
        "layers": model.stack.layers,
        "width": model.stack.width,
        "report": asdict(report),
    }
    save_texts(out, texts)
    if gates is not None:
        heads.save(out / GATES / KEPT, description)
        _save_gates(task, model, gates, states_MED, config, out / GATES)
    # Its presence says that the rest is there.
    heads.save(out, description)
    ClassifyCheckpoint(settings=settings).save(out)  # without what training goes on with
    shutil.rmtree(out / STATES, ignore_errors=True)
    return report


def _begun(out: Path, settings: dict[str, Any]) -> ClassifyCheckpoint:
    """A run with these settings as it was left."""
    checkpoint = ClassifyCheckpoint.load(out)
    checkpoint.require(settings)
    if (out / DESCRIPTION).exists():
        raise ConfigError("resume", f"the run in {out} has ended", "Use what it wrote")
    return checkpoint


def _frozen(
    task: HeadTask,
    model: SequenceModel,
    states_NED: FloatArray,
    config: ClassifyTuneConfig,
    on_progress: OnStage,
) -> tuple[dict[int, ClassHead], MlpPolicy | None]:
    """Heads of the model as it is, and the gates that were fitted with them, if any were."""

    def on_heads(done: int, total: int) -> None:
        on_progress("heads", done, total)

    if config.fit != JOINT:
        return task.plain_heads(states_NED, on_heads), None
    if len(task.exits) < 2:
        raise ConfigError("fit", "joint needs an exit before full depth", "Use heads")
    learned, chosen, _ = task.parts
    read = read_texts(model, task.texts, task.sequences)
    return fit_joint(
        states_NED, read, task.exits, task.pool, learned, chosen, config.cost, config.seed, on_heads
    )


def _whole(
    task: HeadTask,
    model: SequenceModel,
    config: ClassifyTuneConfig,
    checkpoint: ClassifyCheckpoint,
    out: Path,
    on_progress: OnStage,
) -> tuple[SequenceModel, dict[int, ClassHead], FloatArray]:
    """The trained model, as it was saved, its heads, and what they read of the texts held out."""
    heads = checkpoint.training and heads_in(checkpoint.training)
    if heads is None:
        heads = task.plain_heads(
            task.states(model, out / STATES, on_progress),
            lambda *count: on_progress("heads", *count),
        )
    learned = task.parts[0]
    plain = train_whole(
        model,
        heads,
        [task.sequences[place] for place in learned.tolist()],
        task.label_N[learned],
        task.pool,
        config,
        checkpoint,
        lambda state: state.save(out),
        lambda *count: on_progress("train", *count),
    )
    folder = out / MODEL
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    trained = SequenceModel.load(folder, parse_dtype(config.dtype), config.device)
    held = [task.sequences[place] for place in task.held.tolist()]
    return trained, plain, exit_states(trained.stack, held, task.exits, task.pool)


def _save_gates(
    task: HeadTask,
    model: SequenceModel,
    gates: MlpPolicy,
    states_MED: FloatArray,
    config: ClassifyTuneConfig,
    folder: Path,
) -> None:
    """Write the gates as a policy of the heads that are kept in a folder."""
    heads, chosen = model.heads(folder / KEPT), len(task.parts[1])
    read = read_texts(model, task.texts, task.sequences).of(task.parts[2])
    traces = sequence_traces(heads, states_MED[chosen:], read)
    right_N = walk(gates, traces).quality_N(traces, "label") > 0
    contender = Contender(
        family="JEI-DNN",
        setting=config.cost,
        offline_agreement=float(right_N.mean()),
        policy=gates,
        symbol="λ=",
    )
    save_policies(
        folder,
        [contender],
        {
            "task": HEADS_KIND,
            "labels": list(heads.labels),
            "cost": config.cost,
            "seed": config.seed,
        },
        lambda policy: canned_rows(policy, traces),
        (model.fingerprint, model.tokenizer_fingerprint),
        adapters=heads.digest,
    )
    PolicyBundle.load(folder / "00").save(folder / CHOSEN)
    save_texts(folder, task.texts)


def _settings(
    config: ClassifyTuneConfig,
    model: SequenceModel,
    texts: LabelledTexts,
    exits: Sequence[int],
    pool: str,
) -> dict[str, Any]:
    asked = asdict(replace(config, exits=tuple(exits), pool=pool))
    foreign = [each for fit, names in ONLY_WITH.items() if fit != config.fit for each in names]
    unseen = ("data", "text_field", "label_field", "model", "device", "threads", "checkpoint_every")
    for name in {*unseen, *foreign}:
        del asked[name]
    return {
        **asked,
        "exits": list(exits),
        "model": model.fingerprint,
        "tokenizer": model.tokenizer_fingerprint,
        "data": texts.digest,
    }
