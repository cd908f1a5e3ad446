"""What continuous learning decided so far, on disk: killed at any step, it goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from offramp.agents.recording.training_data import COSTS, FACTS
from offramp.agents.retraining.retrain_config import CALIBRATION_SHARE, VALIDATION_SHARE
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.traces import TraceChunk
from offramp.envs.traces.candidate_file import CANDIDATES
from offramp.envs.traces.store import TraceStore, write_traces

STATE = "learning.json"
CALIBRATION = "test"
"""The split of a round's traces that its certificate is made on."""

Stage = Literal["watching", "gathering", "recorded", "trained", "certified", "published"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningState:
    """Where continuous learning stands.

    Attributes:
        stage: What was done last; "watching": nothing is under way.
        round: Number of the round under way, or of the last one.
        why: Reason for the round, in a sentence.
        base: Folder of the traces that the served policy was trained on.
        tested: Requests that a test found unchanged, as far as they are still kept.
        learned: Requests that rounds learned from, likewise.
        policy: SHA-256 of the policy that the round published.
    """

    stage: Stage = "watching"
    round: int = 0
    why: str = ""
    base: str = ""
    tested: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    policy: str = ""

    @classmethod
    def load(cls, folder: Path, base: Path) -> LearningState:
        """What was written last; a beginning if nothing was.

        Raises:
            ConfigError: it is unreadable.
        """
        path = folder / STATE
        if not path.exists():
            return cls(base=str(base))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values | {name: tuple(values[name]) for name in ("tested", "learned")})
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            problem = f"{path} is unreadable ({error})"
            raise ConfigError("learning", problem, "Remove it to begin anew") from error

    def save(self, folder: Path) -> None:
        """Write it durably."""
        write_durably(folder / STATE, json.dumps(asdict(self), indent=1).encode())


def record_round(folder: Path, base: Path, chunks: dict[str, TraceChunk], text: str) -> None:
    """Write what a round learns from, as training reads it; begun anew if it was cut off.

    Live requests are split by their names into training, validation and calibration. As many
    documents of the base's training split join the training split, so that a policy which learns
    what is new keeps what it knew.

    Args:
        folder: Folder of the round's traces.
        base: Folder of the traces that were trained on before.
        chunks: Live traffic, by request.
        text: Says in the header whose text it is.

    Raises:
        TraceError: the base is damaged, or the folder cannot be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    before = TraceStore.open(base)
    store = TraceStore.create(folder, replace(before.header, width=0, text=text))
    known = [each for each in before.chunks if each.split == "train"]
    for entry in known[: len(chunks)]:
        store.append(replace(before.load(entry), state_TED=None), "train")
    for name, chunk in chunks.items():
        store.append(replace(chunk, state_TED=None), split_live(name))
    for name in (CANDIDATES, FACTS, COSTS):  # costs last: they say that it is whole
        write_traces(folder / name, (base / name).read_bytes())


def split_live(document: str) -> str:
    """What a request of live traffic is for, by its name alone."""
    draw = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) / 16**8
    if draw < CALIBRATION_SHARE:
        return CALIBRATION
    return "validation" if draw < CALIBRATION_SHARE + VALIDATION_SHARE else "train"
