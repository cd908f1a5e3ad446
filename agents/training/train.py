"""Learn exit policies from recorded traces: the whole way, top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from stable_baselines3.common.callbacks import BaseCallback

from offramp.agents.placing.contenders import Contender, load_contenders, save_contenders
from offramp.agents.recording.training_data import load_training_data
from offramp.agents.training.families import families_of, place_all
from offramp.agents.training.staged import Checkpoint
from offramp.agents.training.train_config import TrainConfig, adapters_of
from offramp.agents.training.trained_parts import TrainedParts
from offramp.controller.adapters.adapter_folder import keep_adapters
from offramp.controller.errors import ConfigError
from offramp.controller.policies.candidate_table import require_condensable


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
    callback: BaseCallback | None = None,
) -> list[Contender]:
    """Train what the families need, place them all at the targets, and save them.

    The same traces, config and machine give the same policies, byte for byte, whether or not the
    run was interrupted and resumed (docs/training.md says where that ends). On-policy rounds need
    Ray to be up. A finished run is read back: nothing is trained, placed or written.

    Args:
        config: Settings of the run.
        out: Folder of the policies' bundles and their index, and of checkpoints and scalars.
        resume: Whether to go on from the folder's checkpoint.
        on_progress: Told (stage, done so far, in all).
        callback: One of SB3's or a user's (Weights & Biases, MLflow), for the staged PPO.

    Raises:
        TraceError: the traces are missing or damaged.
        ConfigError: a family is unknown; the options do not fit the traces or the checkpoint; the
            costs are of another model; the on-policy model or corpus is not the recorded one; the
            adapters that were recorded through are not there.
        PolicyRefusedError: a policy of a finished run is damaged.
    """
    run = open_run(config, out, resume=resume, on_progress=on_progress, callback=callback)
    return complete(run, out)


def open_run(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
    callback: BaseCallback | None = None,
) -> TrainedParts:
    """Load what a run learns from, and stand where its checkpoint was written; train nothing yet.

    Raises:
        TraceError, ConfigError: as ``train``.
    """
    torch.set_num_threads(config.threads)
    is_staged = any(family.is_staged for family in families_of(config.families))
    if resume and not is_staged:
        raise ConfigError("resume", "is for families that are trained in stages", "Leave it out")
    data = load_training_data(Path(config.traces), Path(config.costs) if config.costs else None)
    require_condensable(data.candidates_VK)
    adapters_of(config, data.facts.translators)
    parts = TrainedParts(config, data, out, on_progress, callback)
    if resume:
        parts.staged.restore(Checkpoint.load(out))
    return parts


def complete(run: TrainedParts, out: Path) -> list[Contender]:
    """Train what is left of a run, place every family, and save; see ``train``."""
    if run.is_finished:
        return load_contenders(out)
    contenders = place_all(run.config.families, run)
    training = asdict(run.config)
    del training["traces"], training["translators"]  # places on one machine
    if (adapters := adapters_of(run.config, run.data.facts.translators)) is not None:
        keep_adapters(adapters, out)
    save_contenders(out, contenders, run.data, training)
    if run.has_stages:
        run.staged.finish()
    return contenders
