"""How the next token is drawn from logits.

Shape suffixes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.worker.decoding.sampling import SamplingParams

COLDEST = 1e-37
"""Lower temperatures count as this one: float32 would round them to 0."""

HOTTEST = 1e37
"""Higher ones count as this one: float32 would round them to infinity."""

HOTTEST_SCORE = 1e3
"""The same of scores, which are multiplied by it."""

OUT_OF_REACH = -1e6
"""Score of what cannot be drawn; all others are above."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token, with what is told of its chances.

    Attributes:
        token: Id of the token.
        logprob: Its log-probability (natural) under the model's own logits; None if not asked for.
        top: The most likely tokens and their log-probabilities, best first, as many as asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """A token that full depth has yet to confirm.

    Attributes:
        token: Id of the token.
        exit_layer: Layers executed before it was drafted.
    """

    token: int
    exit_layer: int


class Sampler:
    """Draws one sequence's tokens.

    A place in the output has one vector of noise, whoever draws there: drafts, and full depth that
    judges them. So a draft is likely full depth's own draw, and full depth draws what it would have
    drawn without drafts, token for token, from the same seed (Daliri et al. 2024,
    "drafter-invariant"). Penalties count what the caller says was emitted, so that tokens may be
    taken back at any time.

    Args:
        sampling: What is asked for.
        prompt: Token ids that the repetition penalty counts as seen.
        eos_tokens: What ``min_tokens`` holds off, besides the stop tokens.
        vocab: Number V of tokens of the model.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        eos_tokens: frozenset[int],
        vocab: int,
    ) -> None:
        self.sampling = sampling
        self.vocab = vocab
        self._generator = _new_generator(sampling)
        self._noise: dict[int, Tensor] = {}
        self._has_processors = _has_processors(sampling)
        self._ends = torch.tensor(sorted({*eos_tokens, *sampling.stop_token_ids}), dtype=torch.long)
        self._bias_tokens = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._prompt_V: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._prompt_V = _marked(torch.zeros(vocab, dtype=torch.bool), prompt)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether a token is the bare argmax of the logits, and nothing is reported of it."""
        sampling = self.sampling
        return sampling.greedy and not self._has_processors and sampling.logprobs is None

    def draw(self, logits_V: Tensor, emitted: Sequence[int]) -> Draw:
        """The next token after those emitted."""
        if self.sampling.greedy:
            # Without a processor this is one argmax where the logits lie, in their own dtype.
            token = int(self._processed(logits_V, emitted).argmax())
        else:
            token = self._pick(self.distribution(logits_V, emitted), len(emitted))
            self._noise.pop(len(emitted), None)
        return self.report(token, logits_V)

    def draft(self, logits_V: Tensor, emitted: Sequence[int]) -> int:
        """What ``draw`` would make of these logits; it may be asked for the same place again."""
        return self._pick(self.distribution(logits_V, emitted), len(emitted))

    def draw_scores(self, logits_V: Tensor, emitted: Sequence[int]) -> Tensor:
        """What ``draft`` takes the largest of, [V], in units of logits; float32, on the CPU.

        Greedily the processed logits, else these plus the temperature times the Gumbel noise of the
        place (Maddison et al. 2014, "A* sampling"). What cannot be drawn is ``OUT_OF_REACH``.
        """
        if self.sampling.greedy:
            scores_V = self._processed(logits_V, emitted).to("cpu", torch.float32)
        else:
            chances_V = self.distribution(logits_V, emitted)
            odds_V = (chances_V / self._noise_at(len(emitted), chances_V)).log_()
            scores_V = odds_V.mul_(min(float(self.sampling.temperature), HOTTEST_SCORE))
        return scores_V.clamp(min=OUT_OF_REACH)

    def distribution(self, logits_V: Tensor, emitted: Sequence[int]) -> Tensor:
        """Probabilities [V] that ``draw`` draws from; float32, on the CPU, of sum 1.

        Greedy decoding has all of it on one token, and so have logits that are not finite. A
        function of its arguments alone.
        """
        logits_V = self._processed(logits_V, emitted).to("cpu", torch.float32)
        if self.sampling.greedy:
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
        # Below the best logit all are negative, so that no division overflows to infinity.
        temperature = min(max(float(self.sampling.temperature), COLDEST), HOTTEST)
        below_V = (logits_V - logits_V.max()) / temperature
        chances_V = self._truncated(below_V.softmax(-1))
        if not bool(chances_V.isfinite().all()):
            # Nothing can be drawn from NaN. The argmax, as greedily: other rows must go on.
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
        return chances_V

    def report(self, token: int, logits_V: Tensor) -> Draw:
        """A token that was chosen, with what is asked about it."""
        count = self.sampling.logprobs
        if count is None:
            return Draw(token)
        return report_each([token], logits_V[None], count)[0]

    def _pick(self, chances_V: Tensor, place: int) -> int:
        """One token by the noise of a place; greedily the most likely."""
        if self._generator is None:
            return int(chances_V.argmax())
        return int((chances_V / self._noise_at(place, chances_V)).argmax())

    def _noise_at(self, place: int, like_V: Tensor) -> Tensor:
        """Noise of a place, the same however often it is asked for, [V]."""
        if place not in self._noise:
            # torch.multinomial's own, which draws one token in just this way.
            noise_V = torch.empty_like(like_V).exponential_(1, generator=self._generator)
            self._noise[place] = noise_V
        return self._noise[place]

    def _processed(self, logits_V: Tensor, emitted: Sequence[int]) -> Tensor:
        """What does not need a temperature, in vLLM's order; the logits themselves if nothing."""
        if not self._has_processors:
            return logits_V
        logits_V = logits_V.to("cpu", torch.float32, copy=True)
        if len(emitted) < self.sampling.min_tokens:
            logits_V[self._ends] = -torch.inf
        logits_V[self._bias_tokens] += self._bias
        if self._prompt_V is not None:
            seen_V = _marked(self._prompt_V.clone(), emitted)
            logits_V = _repetition(logits_V, seen_V, float(self.sampling.repetition_penalty))
        return self._additive(logits_V, emitted)

    def _additive(self, logits_V: Tensor, emitted: Sequence[int]) -> Tensor:
        """OpenAI's presence and frequency penalties, over the output alone."""
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if not (presence or frequency):
            return logits_V
        tokens = torch.tensor(emitted, dtype=torch.long)
        counts_V = torch.bincount(tokens, minlength=len(logits_V))
        return logits_V - frequency * counts_V - presence * (counts_V > 0)

    def _truncated(self, probabilities_V: Tensor) -> Tensor:
        sampling = self.sampling
        if sampling.min_p > 0:
            least = sampling.min_p * probabilities_V.max()
            probabilities_V = _only(probabilities_V, probabilities_V >= least)
        if 0 < sampling.top_k < len(probabilities_V):
            least = probabilities_V.topk(sampling.top_k).values[-1]
            probabilities_V = _only(probabilities_V, probabilities_V >= least)
        if sampling.top_p < 1:
            probabilities_V = _nucleus(probabilities_V, sampling.top_p)
        return probabilities_V


def report_each(tokens: Sequence[int], logits_NV: Tensor, count: int) -> list[Draw]:
    """What is told of tokens that were chosen.

    Args:
        tokens: Ids of the N tokens.
        logits_NV: The logits that each was chosen by.
        count: How many of the most likely tokens to name.
    """
    logprobs_NV = logits_NV.float().log_softmax(-1)
    best = logprobs_NV.topk(min(count, logprobs_NV.shape[-1]))
    chosen_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    own = logprobs_NV.gather(-1, chosen_N1)[:, 0].tolist()
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Draw(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, top in zip(tokens, own, tops, strict=True)
    ]


def _new_generator(sampling: SamplingParams) -> torch.Generator | None:
    if sampling.greedy:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def _has_processors(sampling: SamplingParams) -> bool:
    """Whether anything but the temperature and what follows it changes the logits."""
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    return bool(
        sampling.min_tokens
        or sampling.logit_bias
        or any(penalties)
        or sampling.repetition_penalty != 1
    )


def _marked(seen_V: Tensor, tokens: Sequence[int]) -> Tensor:
    seen_V[torch.tensor(tokens, dtype=torch.long)] = True
    return seen_V


def _repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return torch.where(seen_V, penalised_V, logits_V)


def _only(probabilities_V: Tensor, keep_V: Tensor) -> Tensor:
    kept_V = torch.where(keep_V, probabilities_V, 0.0)
    return kept_V / kept_V.sum()


def _nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens that holds top_p (Holtzman et al. 2020)."""
    ordered_V, order_V = probabilities_V.sort(descending=True, stable=True)
    # A token stays if the mass before it is below top_p, so at least the best one does.
    before_V = ordered_V.cumsum(-1) - ordered_V
    keep_V = before_V < top_p
    keep_V[0] = True  # a top_p that float32 rounds to 0
    return _only(probabilities_V, torch.zeros_like(keep_V).scatter_(0, order_V, keep_V))
