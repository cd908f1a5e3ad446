"""Hugging Face's logits processors as a sampler of the engine.

Shape suffixes: N tokens of the padded prompt and the output, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from offramp.worker.decoding.sampler import Draw, Sampler
from offramp.worker.decoding.sampling import SamplingParams

ROWWISE = frozenset(
    getattr(transformers, name)
    for name in (
        "EosTokenCriteria",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "StopStringCriteria",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
    if hasattr(transformers, name)
)
"""Processors and criteria that treat all rows of a batch alike."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which row of the caller's batch a sequence is.

    Attributes:
        row: Index of the row in its batch.
        rows: Rows in all.
    """

    row: int
    rows: int

    def ask(self, each: Callable[..., Tensor], ids_N: Tensor, scores_V: Tensor) -> Tensor:
        """What a logits processor makes of this row's scores, [V].

        A processor may tell rows apart by their index (a repetition penalty by the row's padding,
        a prefix function by the batch id), so it sees this one among copies of itself.
        """
        copies = self._copies(each)
        answer = each(ids_N.repeat(copies, 1), scores_V.repeat(copies, 1))
        return answer[self.row if copies > 1 else 0]

    def ends(self, each: Any, ids_N: Tensor, scores: tuple[Tensor, ...] | None) -> bool:
        """Whether a stopping criterion ends this row.

        Args:
            each: Criterion to ask.
            ids_N: Token ids of the row so far.
            scores: Its processed scores so far, each [V], if they are recorded.
        """
        copies = self._copies(each)
        shown = None if scores is None else tuple(part.repeat(copies, 1) for part in scores)
        done = each(ids_N.repeat(copies, 1), shown)
        return bool(torch.as_tensor(done).expand(copies)[self.row if copies > 1 else 0])

    def _copies(self, each: Any) -> int:
        return 1 if type(each) in ROWWISE else self.rows


class HFSampler(Sampler):
    """Draws one row's tokens as ``generate`` does: its processors, torch's global generator.

    Processors must be functions of their arguments: a draft that is taken back is asked for again.

    Args:
        sampling: Temperature 0 for greedy decoding, else 1: warpers are among the processors.
        place: The row's index.
        prompt_N: Its prompt as ``generate`` got it, padding included.
        processors: Logits processors, in order.
        vocab: Number V of tokens of the model.
        records: Whether logits and scores of emitted tokens are kept.

    Attributes:
        logits, scores: Vectors [V] of each emitted token, as the model gave them and as processed.
        error: What a processor raised first; the caller raises it once the engine's step is over.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        place: Place,
        prompt_N: Tensor,
        processors: Sequence[Any],
        vocab: int,
        *,
        records: bool = False,
    ) -> None:
        super().__init__(sampling, (), frozenset(), vocab)
        self._generator = None if sampling.greedy else torch.default_generator
        self.place = place
        self.prompt_N = prompt_N
        self.processors = processors
        self.records = records
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.error: Exception | None = None
        self._latest_V: Tensor | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether a token is the bare argmax of the logits, and nothing is kept of it."""
        return self.sampling.greedy and not self.processors and not self.records

    def ids(self, emitted: Sequence[int]) -> Tensor:
        """The padded prompt and some tokens after it, [N]."""
        return torch.cat([self.prompt_N, self.prompt_N.new_tensor(emitted)])

    def report(self, token: int, logits_V: Tensor) -> Draw:
        """A token that was chosen; it keeps the scores that were computed last, which are its."""
        if self.records:
            assert self._latest_V is not None  # every token is chosen from scores
            self.logits.append(logits_V.to(self.prompt_N.device, torch.float32, copy=True))
            self.scores.append(self._latest_V)
        return Draw(token)

    def _processed(self, logits_V: Tensor, emitted: Sequence[int]) -> Tensor:
        ids_N = self.ids(emitted)
        scores_V = logits_V.to(ids_N.device, torch.float32, copy=True)
        try:
            for processor in self.processors:
                scores_V = self.place.ask(processor, ids_N, scores_V)
        except Exception as error:  # foreign code: other rows of the engine must not suffer
            self.error = self.error or error
        self._latest_V = scores_V
        return scores_V
