"""Early exits behind Hugging Face's own ``model.generate``.

Shape suffixes: B rows, N columns of the padded prompts, T new columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput

from offramp.controller.errors import RequestError
from offramp.controller.policies.protocols import ExitPolicy
from offramp.worker.decoding.request import KVMode, PolicySnapshot, Request, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.hf.hf_limits import (
    passed_over,
    prompt_lengths,
    require_inputs,
    require_plain,
    require_positions,
    require_stateless,
)
from offramp.worker.hf.hf_sampler import HFSampler, Place


@dataclass
class EarlyExitOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers is untyped
    """What ``generate`` returns with ``return_dict_in_generate``.

    Logits and scores are those of the layer that a token left from (``verify``: full depth's), and
    0 in the steps after a row's end.

    Attributes:
        exit_layers: Layers executed for each new token, [B, T]; 0 after a row's end.
    """

    exit_layers: Tensor | None = None


def early_exit(
    engine: AdaptiveEngine,
    policy: ExitPolicy | PolicySnapshot | None = None,
    kv_mode: KVMode | None = None,
) -> EarlyExit:
    """What to pass to ``model.generate(..., custom_generate=...)``.

    Args:
        engine: Made from the very model whose ``generate`` is called.
        policy: Says where tokens exit; the engine's current one by default.
        kv_mode: What becomes of skipped layers; the engine's own mode by default.
    """
    return EarlyExit(engine, policy, kv_mode)


class EarlyExit:
    """Decodes as ``generate`` asks, through an engine.

    Honours logits processors and warpers, stopping criteria, ``do_sample`` with torch's global
    generator, length, end-of-sequence and padding tokens, ``num_return_sequences``, streamers,
    ``return_dict_in_generate``, ``output_scores`` and ``output_logits``. Processors and criteria
    must be functions of their arguments. Prompts are padded on the left. ``stop_strings`` does not
    reach a callable in transformers 5.23: pass ``stopping_criteria=[StopStringCriteria(...)]``.

    Args: as for ``early_exit``.
    """

    def __init__(
        self,
        engine: AdaptiveEngine,
        policy: ExitPolicy | PolicySnapshot | None = None,
        kv_mode: KVMode | None = None,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.kv_mode = kv_mode

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Sequence[Any],
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | EarlyExitOutput:
        """Prompts and their completions, [B, N + T], as ``generate`` returns them.

        Raises:
            RequestError: another model than the engine's, a flag or input that cannot be honoured,
                or what the engine refuses.
        """
        beside = {"synced_gpus": synced_gpus, **passed_over()}
        streamer = streamer or beside.pop("streamer", None)
        require_same(self.engine, model)
        require_plain(generation_config, beside)
        require_inputs(model_kwargs)
        require_stateless(logits_processor)
        lengths = prompt_lengths(model_kwargs.get("attention_mask"), input_ids)
        require_positions(model_kwargs.get("position_ids"), lengths, input_ids.shape[1])
        batch = _Batch(input_ids, stopping_criteria, generation_config, streamer)
        try:
            for length in lengths:
                batch.rows.append(self._submit(batch, length, logits_processor))
            self._decode(batch)
        finally:
            for row in batch.rows:
                self.engine.cancel(row.request.id)
        return batch.output()

    def _submit(self, batch: _Batch, length: int, processors: Sequence[Any]) -> _Row:
        place = Place(len(batch.rows), len(batch.input_ids_BN))
        prompt_N, sampling = batch.input_ids_BN[place.row], batch.sampling(self.engine.stack.vocab)
        sampler = HFSampler(
            sampling, place, prompt_N, processors, self.engine.stack.vocab, records=batch.records
        )
        prompt = prompt_N[len(prompt_N) - length :].tolist()
        request = self.engine.submit(
            prompt, sampling, self.policy, kv_mode=self.kv_mode, sampler=sampler
        )
        return _Row(request, sampler)

    def _decode(self, batch: _Batch) -> None:
        rows = {row.request.id: row for row in batch.rows}
        for event in self.engine.follow([row.request for row in batch.rows]):
            failed = next((r.sampler.error for r in batch.rows if r.sampler.error), None)
            if failed is not None:
                raise failed
            for row in batch.take(rows[event.request_id], event):
                self.engine.cancel(row.request.id)
            batch.stream()
        if batch.streamer is not None:
            batch.streamer.end()


def require_same(engine: AdaptiveEngine, model: Any) -> None:
    """Refuse a model that is not the engine's own object.

    Raises:
        RequestError: naming both classes.
    """
    own = engine.model
    if own is not model:
        raise RequestError(
            "custom_generate",
            f"the engine decodes another model ({type(own).__name__} at {id(own):#x}) than the "
            f"one that generates ({type(model).__name__} at {id(model):#x})",
            "Make the engine from this very object: AdaptiveEngine(model)",
        )


@dataclass(slots=True, eq=False)
class _Row:
    """One row on its way.

    Attributes:
        request: What the engine decodes.
        sampler: Draws its tokens.
        tokens, exit_layers: What was emitted.
        end: Tokens after which a criterion ended it.
    """

    request: Request
    sampler: HFSampler
    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    end: int | None = None


class _Batch:
    """The caller's rows, decoded each on its own and put side by side as ``generate`` does.

    A row that ended is padded if some criterion knows end-of-sequence tokens; else it goes on
    until the last row ends, as in ``generate``.

    Args:
        input_ids_BN: Prompts, padded to one length.
        criteria: Stopping criteria of the call.
        config: Generation configuration of the call.
        streamer: Gets each column as soon as all rows have it.
    """

    def __init__(self, input_ids_BN: Tensor, criteria: Any, config: Any, streamer: Any) -> None:
        self.input_ids_BN = input_ids_BN
        self.criteria = criteria
        self.config = config
        self.streamer = streamer
        self.rows: list[_Row] = []
        self.pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self.returns_dict = bool(config.return_dict_in_generate)
        asked = config.output_scores or config.output_logits
        self.records = bool(self.returns_dict and asked)
        self._going = len(input_ids_BN)
        self._longest = 0
        self._streamed = 0

    def sampling(self, vocab: int) -> SamplingParams:
        """What the engine itself needs to know; the rest is the sampler's and the criteria's."""
        ends = [e.eos_token_id for e in self.criteria if type(e) is EosTokenCriteria]
        tokens = {int(token) for part in ends for token in torch.as_tensor(part).flatten()}
        columns = self.input_ids_BN.shape[1]
        return SamplingParams(
            max_tokens=(self.criteria.max_length or self.config.max_length) - columns,
            temperature=1.0 if self.config.do_sample else 0.0,
            stop_token_ids=tuple(sorted(token for token in tokens if 0 <= token < vocab)),
            ignore_eos=True,
        )

    def take(self, row: _Row, event: TokenEvent) -> list[_Row]:
        """Note a row's next token; the rows of whom further tokens are of no use."""
        row.tokens.append(event.token)
        row.exit_layers.append(event.exit_layer)
        if row.end is None and (self._is_done(row) or event.finish_reason is not None):
            row.end = len(row.tokens)
            self._going -= 1
            self._longest = max(self._longest, row.end)
        if self.pads:
            return [] if row.end is None else [row]
        return [] if self._going else [r for r in self.rows if len(r.tokens) >= self._longest]

    def stream(self) -> None:
        """Show the columns that all rows have."""
        if self.streamer is None:
            return
        going = [len(row.tokens) for row in self.rows if not (self.pads and row.end is not None)]
        known = min(going if self._going else [*going, self._longest])
        while self._streamed < known:
            self.streamer.put(self._column([row.tokens for row in self.rows], self._pad))
            self._streamed += 1

    def output(self) -> Tensor | EarlyExitOutput:
        """The finished rows in ``generate``'s form."""
        columns = range(self._longest)
        tokens_BT = self._table([row.tokens for row in self.rows], self._pad)
        sequences = torch.cat([self.input_ids_BN, tokens_BT], dim=-1)
        if not self.returns_dict:
            return sequences
        scores = [row.sampler.scores for row in self.rows]
        logits = [row.sampler.logits for row in self.rows]
        return EarlyExitOutput(
            sequences=sequences,
            scores=_steps(scores, columns) if self.config.output_scores else None,
            logits=_steps(logits, columns) if self.config.output_logits else None,
            exit_layers=self._table([row.exit_layers for row in self.rows], 0),
        )

    @property
    def _pad(self) -> int:
        token = self.config._pad_token_tensor
        return 0 if token is None else int(token)

    def _is_done(self, row: _Row) -> bool:
        sampler, ids_N = row.sampler, row.sampler.ids(row.tokens)
        scores = None
        if self.records and self.config.output_scores:
            scores = tuple(sampler.scores[: len(row.tokens)])
        return any([sampler.place.ends(each, ids_N, scores) for each in self.criteria])

    def _table(self, rows: list[list[int]], filler: int) -> Tensor:
        columns = range(self._longest)
        table = [[row[c] if c < len(row) else filler for c in columns] for row in rows]
        return torch.tensor(table, dtype=torch.long, device=self.input_ids_BN.device)

    def _column(self, rows: list[list[int]], filler: int) -> Tensor:
        column = self._streamed
        return torch.tensor([row[column] if column < len(row) else filler for row in rows])


def _steps(rows: list[list[Tensor]], columns: range) -> tuple[Tensor, ...]:
    """What was recorded of each row, by step [B, V]."""
    nothing_V = torch.zeros_like(rows[0][0])
    return tuple(
        torch.stack([row[column] if column < len(row) else nothing_V for row in rows])
        for column in columns
    )
