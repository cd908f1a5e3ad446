"""Fit exits to a model that was not trained to exit: the whole way, top to bottom.

Shape suffixes: B rows, T tokens, W documents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from offramp.agents.recording.own_text import only_texts
from offramp.agents.tuning.distil import (
    Trainable,
    backward_from,
    freeze,
    fresh_layers,
    fresh_translators,
)
from offramp.agents.tuning.exit_losses import loss_head
from offramp.agents.tuning.plot import draw_tuning
from offramp.agents.tuning.quality import TuneReport, compare, measure, summarise
from offramp.agents.tuning.ridge import start_translators
from offramp.agents.tuning.state_feed import STATES, StateFeed
from offramp.agents.tuning.stream import WindowStream, data_digest
from offramp.agents.tuning.texts import chosen_documents, read_texts
from offramp.agents.tuning.tune_checkpoint import TuneCheckpoint
from offramp.agents.tuning.tune_config import OnTuning, TuneConfig, require_exits, require_fit
from offramp.controller.errors import ConfigError
from offramp.envs.traces.candidate_file import save_candidates
from offramp.worker.model.adapter_layers import AdapterLayers
from offramp.worker.model.families import stack_for
from offramp.worker.model.loading import (
    load_model,
    load_tokenizer,
    model_fingerprint,
    parse_dtype,
    require_device,
)
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import ExitTranslators
from offramp.worker.probes.candidates.successors import successor_table

PLOT = "tune.png"

WARM_UP_SHARE = 0.05
"""Share of the steps in which the learning rate rises to its peak; a cosine to 0 follows."""

START_BATCHES = 9
"""Batches read before the first step: one to judge a start by, the others to find it."""

CURVE_POINTS = 200
"""Training losses kept for the report."""

LOOKS = 12
"""Times that agreement is looked at in a run."""

FEW = 4
"""Held-out texts that it is looked at on."""

LARGEST_GRADIENT = 1.0
"""Norm of a translator's gradient; longer ones are shortened to it."""


def tune(
    config: TuneConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_progress: OnTuning = lambda *_: None,
) -> TuneReport:
    """Fit translators, measure them, save them with a report, a plot and a successor table.

    The same config, documents, machine and threads give the same files on a CPU, byte for byte,
    however often the run was stopped and resumed.

    Args:
        config: The model, its exits and how to fit them.
        folder: Folder that everything is written to.
        resume: Whether to go on from the folder's checkpoint.
        on_progress: Told of "own text" in texts, then of "tune" in tokens trained on.

    Raises:
        ConfigError: an option is unusable, the checkpoint is another run's, or training diverged.
        ModelError: the model cannot be loaded.
        TraceError: there are no documents, or the folder's own text is another run's.
    """
    exits = require_exits(config)
    require_device(config.device)
    checkpoint = TuneCheckpoint.load(folder) if resume and not only_texts(folder, STATES) else None
    if checkpoint is None:
        (folder / STATES).unlink(missing_ok=True)  # of a run cut off before its first checkpoint
    torch.set_num_threads(config.threads)
    run = _Tuning(config, exits, folder, on_progress)
    if config.minutes is not None:
        run.take(checkpoint.settings["steps"] if checkpoint else run.steps_within(config.minutes))
    if checkpoint is not None:
        checkpoint.require(run.settings)
    modules, curve = run.fit(checkpoint)
    fitted = freeze(modules)
    report = run.report(fitted, curve)
    run.save(fitted, report)
    return report


def rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate in this step, counted from 0: warm-up, then cosine to 0."""
    warm_up = max(1, math.ceil(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


class _Tuning:
    """What one run works on: the model and its texts."""

    def __init__(
        self, config: TuneConfig, exits: tuple[int, ...], folder: Path, on_progress: OnTuning
    ) -> None:
        documents = chosen_documents(config)  # refused, if they are, before anything is loaded
        model = load_model(config.model, parse_dtype(config.dtype), config.device)
        tokenizer = load_tokenizer(config.model)
        self.config, self.exits, self.on_progress = config, exits, on_progress
        self.folder = folder
        self.stack: LayerStack = stack_for(model)
        self.separator: int | None = tokenizer.eos_token_id
        require_fit(config, self.stack)
        self.texts = read_texts(config, documents, folder, model, tokenizer, on_progress)
        self.counts = Counter(token for each in self.encoded() for token in each)
        self.settings: dict[str, Any] = {
            "model": model_fingerprint(model),
            "data": data_digest(*documents),
            "exits": list(exits),
            "kind": config.kind,
            "inner": config.inner,
            "shared": config.shared,
            "rank": config.rank,
            "steps": config.steps,
            "batch_tokens": config.batch_tokens,
            "length": config.length,
            "lr": config.learning_rate,
            "loss": config.loss,
            "loss_tokens": config.loss_tokens,
            "dtype": config.dtype,
            "seed": config.seed,
            "own_text": config.own_text and asdict(config.own_text),
            "keeps_states": self.feed().keeps,
        }

    def encoded(self) -> Iterator[list[int]]:
        return (self.texts.encode(document) for document in self.texts.train)

    def stream(self) -> WindowStream:
        return WindowStream(
            self.texts.train,
            self.texts.encode,
            self.separator,
            rows=self.config.batch_tokens // self.config.length,
            length=self.config.length,
            seed=self.config.seed,
        )

    def feed(self) -> StateFeed:
        ends = 0 if self.separator is None else len(self.texts.train)
        tokens = self.counts.total() + ends
        return StateFeed(self.config, self.stack, self.exits, self.stream, tokens, self.folder)

    def steps_within(self, minutes: float) -> int:
        """Optimizer steps that fit into the time, 1 or more; nothing of the trial is kept."""
        modules = self._fresh(resumes=True)
        head, by = loss_head(self.stack, self.counts, self.config.loss_tokens), self.config.loss
        return self.feed().steps_within(
            60 * minutes, lambda x: backward_from(*x, modules, head, by)
        )

    def take(self, steps: int) -> None:
        """Do so many steps."""
        self.config = replace(self.config, steps=steps)
        self.settings |= {"steps": steps, "keeps_states": self.feed().keeps}

    def fit(
        self, checkpoint: TuneCheckpoint | None
    ) -> tuple[dict[int, Trainable], list[list[float]]]:
        config, feed = self.config, self.feed()
        modules = self._start(checkpoint)
        head = loss_head(self.stack, self.counts, config.loss_tokens)
        own = list(modules.values())[: 1 if config.shared else None]
        groups = [{"params": list(each.parameters())} for each in own]
        optimizer = torch.optim.Adam(groups, lr=config.learning_rate)
        curve: list[list[float]] = []
        done, looks = 0, max(1, config.steps // LOOKS)
        said = self._look(modules)
        if checkpoint is not None:
            optimizer.load_state_dict(checkpoint.optimizer)
            feed.seek(checkpoint.position, checkpoint.step)
            curve, done = checkpoint.curve, checkpoint.step
        size = config.batch_tokens
        self.on_progress("tune", done * size, config.steps * size, f"{said}; {feed.plan}")
        for step in range(done, config.steps):
            losses = backward_from(*feed.next(step), modules, head, config.loss)
            _require_finite(losses, step)
            _step(optimizer, config.learning_rate * rate_share(step, config.steps))
            if step % max(1, config.steps // CURVE_POINTS) == 0:
                curve.append([step, *losses.values()])
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                feed.settle()
                states = {layer: each.state_dict() for layer, each in modules.items()}
                TuneCheckpoint(
                    settings=self.settings, step=done, modules=states,
                    optimizer=optimizer.state_dict(), position=feed.position, curve=curve,
                ).save(self.folder)  # fmt: skip
            if done % looks == 0:
                said = self._look(modules)
            self.on_progress("tune", done * size, config.steps * size, f"{said}; {feed.plan}")
        feed.remove()
        return modules, curve

    def _start(self, checkpoint: TuneCheckpoint | None) -> dict[int, Trainable]:
        modules = self._fresh(resumes=checkpoint is not None)
        if checkpoint is not None:
            for layer, module in modules.items():
                module.load_state_dict(checkpoint.modules[layer])
        return modules

    def _fresh(self, resumes: bool) -> dict[int, Trainable]:
        stack, exits, config = self.stack, self.exits, self.config
        if config.kind == "layer":
            return fresh_layers(stack, exits, config.length, config.inner, config.shared)
        stream = self.stream()  # of its own: training reads the very same batches
        batches = (stream.next().to(stack.device) for _ in range(START_BATCHES))
        if resumes:
            return dict(fresh_translators(stack, exits, config.rank, next(batches), config.seed))
        return dict(start_translators(stack, exits, config.rank, batches, config.seed))

    def _look(self, modules: dict[int, Trainable]) -> str:
        """Agreement so far, by exit, on a few held-out texts of the kind that is fitted to."""
        texts = (self.texts.people if self.config.own_text is None else self.texts.own).few(FEW)
        served = freeze(modules).to(self.stack.dtype, self.stack.device)
        sums = measure(self.stack, served, texts.windows, self.exits, texts.firsts)
        found = summarise(sums, sum(texts.tokens))
        return "agreement " + ", ".join(f"{row.layer}: {row.agreement:.2f}" for row in found[:-1])

    def report(
        self, fitted: ExitTranslators | AdapterLayers, curve: list[list[float]]
    ) -> TuneReport:
        served = fitted.to(self.stack.dtype, self.stack.device)
        people, own = (
            compare(self.stack, served, each, self.exits, self.config.seed)
            for each in (self.texts.people, self.texts.own)
        )
        return TuneReport.of(people, own, curve)

    def save(self, fitted: ExitTranslators | AdapterLayers, report: TuneReport) -> None:
        description = {
            **self.settings,
            "layers": self.stack.layers,
            "width": self.stack.width,
            "report": asdict(report),
        }
        table_VK = successor_table(self.encoded(), self.stack.vocab, self.config.candidates)
        save_candidates(self.folder, table_VK)
        draw_tuning(report.before, report.after, report.curve, self.folder / PLOT)
        # Last: its presence says that the rest is there.
        fitted.save(self.folder, description)


def _require_finite(losses: dict[int, float], step: int) -> None:
    for layer, loss in losses.items():
        if not math.isfinite(loss):
            raise ConfigError(
                "lr", f"the loss of exit {layer} is {loss} in step {step}", "Use a smaller one"
            )


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], LARGEST_GRADIENT)
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
