"""What the demo does, and how much of it."""

from __future__ import annotations

import shutil
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import Exit
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.precision import Precision

MARKER = ".offramp-demo"
"""A folder that holds this file was made by the demo and may be emptied by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo.

    Attributes:
        model: Folder of the model.
        dtype: Dtype of its weights, "float32" or "bfloat16".
        draft_weights: Weights of a copy of all its layers that drafts run on, such as "int4"; ""
            drafts at early exits of the model's own.
        is_lossless: Whether it ends after the lossless part.
        out: Folder of everything the demo writes; emptied first.
        port: HTTP port of the pool; 0 takes a free one.
        seed: Seeds training and bootstrap.
        documents: Documents taken from the standard library.
        drafted_tokens: Tokens that the model goes on for after the beginning of each; drafters
            learn from these.
        draft_steps: Decisions of the PPO drafter's training.
        profile_s: Seconds of measuring what a token's parts cost here.
        tokens_per_document: Tokens recorded of each for gates.
        ppo_steps: Environment steps of the PPO gate's training.
        validation_documents, test_documents, timed_documents: Documents for each purpose, as in
            ``AssessConfig``.
        lines: Lines completed in each.
        target_agreement: Least on-policy agreement of the gate that is chosen.
        replicas: Workers in the pool, and recorders.
        threads: Torch threads of each, and of the evaluation; training has one of its own.
        in_flight: Streaming requests under way while the policy is swapped.
        prompts: Requests that are timed one after the other, under each policy.
        new_tokens: Tokens of each.
        intents: Classes that texts are told apart by in the last act.
    """

    model: str = "models/reference"
    dtype: str = "float32"
    draft_weights: str = ""
    is_lossless: bool = False
    out: Path = Path("runs/demo")
    port: int = 0
    seed: int = 0
    documents: int = 240
    drafted_tokens: int = 128
    draft_steps: int = 800_000
    profile_s: float = 10.0
    tokens_per_document: int = 192
    ppo_steps: int = 500_000
    validation_documents: int = 6
    test_documents: int = 8
    timed_documents: int = 4
    lines: int = 1
    target_agreement: float = 0.93
    replicas: int = 2
    threads: int = 1
    in_flight: int = 6
    prompts: int = 6
    new_tokens: int = 64
    intents: int = 8

    @property
    def engine(self) -> EngineConfig:
        """How rows are decoded: drafts are verified, on the copy if there is one."""
        copy = Precision.parse(self.draft_weights) if self.draft_weights else None
        return EngineConfig(kv_mode="verify", draft_precision=copy)

    def exits(self, layers: int) -> tuple[int, ...]:
        """Where drafts may leave a model of so many layers: all of a copy's, or () for defaults."""
        copy = self.engine.draft_precision
        return (Exit(layers, copy.weights),) if copy else ()

    @property
    def candidates(self) -> int:
        """Candidates that drafts come from; a copy, whose head is cheap, drafts with the head."""
        return 0 if self.draft_weights else DraftingConfig(model=self.model).candidates

    def shortened(self) -> DemoConfig:
        """Make the same loop with less data: for tests, and for a first look."""
        return replace(
            self,
            documents=48,
            drafted_tokens=48,
            draft_steps=65_536,
            profile_s=5.0,
            tokens_per_document=96,
            ppo_steps=100_000,
            validation_documents=2,
            test_documents=3,
            timed_documents=1,
            lines=1,
            in_flight=4,
            prompts=2,
            new_tokens=32,
            intents=2,
        )


def prepare_folder(folder: Path) -> None:
    """Empty the demo's own folder, or make it.

    Raises:
        ConfigError: the folder holds something that no demo wrote.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError("out", f"{folder} is not empty", "Name a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
