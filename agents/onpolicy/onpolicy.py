"""The on-policy phase: collectors decode, one learner updates, until the rounds are over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from offramp.agents.onpolicy.collector import CollectSpec, Task
from offramp.agents.onpolicy.learner import Learner, LearnerConfig
from offramp.agents.onpolicy.pool import CollectorPool
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import IntArray

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicyConfig:
    """How the on-policy phase runs.

    Attributes:
        rounds: Updates; 0 leaves the phase out.
        documents: Rollouts per update.
        together: Documents that a collector decodes at once.
        tokens: Tokens decoded of each, after its prompt.
        prompt_tokens: Tokens of each read at full depth first.
        collectors: Ray actors at work.
        max_lag: Versions by which a rollout may be older than the learner's. With 0 nobody works
            ahead, and several collectors, too, repeat a run bit for bit.
        kv_mode: ``project`` or ``defer``.
        model: Folder of the model, as the collectors' machines see it.
        corpus: Folder of the documents; "" takes the interpreter's standard library.
        corpus_documents: Documents taken from it, over all splits, as when they were recorded.
        learner: Settings of the updates.
    """

    rounds: int = 0
    documents: int = 32
    together: int = 4
    tokens: int = 96
    prompt_tokens: int = 32
    collectors: int = 1
    max_lag: int = 1
    kv_mode: str = "project"
    model: str = ""
    corpus: str = ""
    corpus_documents: int = 320
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        for name in ("documents", "together", "tokens", "prompt_tokens", "collectors"):
            if getattr(self, name) < 1:
                raise ConfigError(f"onpolicy.{name}", f"{getattr(self, name)} is below 1")
        if self.rounds < 0 or self.max_lag < 0:
            raise ConfigError("onpolicy", "rounds and max_lag are 0 or more")
        if self.kv_mode not in ("project", "defer"):
            raise ConfigError(
                "onpolicy.kv_mode",
                f"{self.kv_mode!r} trades no quality, or is unknown",
                "Use project or defer",
            )


def run_onpolicy(
    learner: Learner,
    spec: CollectSpec,
    candidates_VK: IntArray,
    documents: Sequence[tuple[str, Tokens]],
    lambda_range: tuple[float, float],
    config: OnPolicyConfig,
    on_round: Callable[[int, dict[str, float]], None] = lambda *_: None,
    done: int = 0,
) -> None:
    """Collect and update, until ``config.rounds`` rounds are done.

    Ray must be up. With one collector, or without lag, a round is a function of the learner's
    state and its number: it decodes its own share of the tasks, under its own version, and learns
    from them in their order. Otherwise collectors work ahead, and which rollouts a round gets is
    the machine's doing. Tasks in hand after the last round are lost.

    Args:
        learner: Updated in place.
        spec: What each collector loads and records.
        candidates_VK: Their candidate table.
        documents: Digest and tokens of each training document.
        lambda_range: Preferences are drawn log-uniformly, one per document.
        config: Settings of the on-policy phase.
        on_round: Told (rounds done, what the round was like).
        done: Rounds that the learner has behind it.

    Raises:
        TraceError: no document is long enough.
        ConfigError: the cluster cannot hold the collectors, or they die again and again.
    """
    pool = CollectorPool(spec, candidates_VK, config.collectors, config.max_lag)
    share = -(-config.documents // config.together)
    tasks = itertools.islice(make_tasks(documents, lambda_range, config), done * share, None)
    pool.start()
    try:
        for number in range(done + 1, config.rounds + 1):
            pool.publish(learner.policy())
            now = tasks if config.max_lag else itertools.islice(tasks, share)
            summary = learner.learn(pool.collect(now, config.documents))
            summary |= {"stale": pool.counts.stale, "reissued": pool.counts.reissued}
            on_round(number, summary)
    finally:
        pool.stop()


def make_tasks(
    documents: Sequence[tuple[str, Tokens]],
    lambda_range: tuple[float, float],
    config: OnPolicyConfig,
) -> Iterator[Task]:
    """Tasks without end: documents in a new random order each pass, each with its own λ.

    Raises:
        TraceError: no document is long enough.
    """
    length = config.prompt_tokens + config.tokens + 1
    fitting = [(name, tokens[:length]) for name, tokens in documents if len(tokens) >= length]
    if not fitting:
        raise TraceError(
            "documents", f"none has {length} tokens", "Lower onpolicy.tokens or prompt_tokens"
        )
    return _endless(fitting, lambda_range, config)


def _endless(
    documents: Sequence[tuple[str, Tokens]],
    lambda_range: tuple[float, float],
    config: OnPolicyConfig,
) -> Iterator[Task]:
    rng = np.random.default_rng(config.learner.seed)
    low, high = np.log(lambda_range)
    waiting: list[int] = []
    for number in itertools.count():
        while len(waiting) < config.together:
            waiting += rng.permutation(len(documents)).tolist()
        chosen, waiting = waiting[: config.together], waiting[config.together :]
        preferences = np.exp(rng.uniform(low, high, size=len(chosen))).tolist()
        parts = [
            (*documents[i], preference) for i, preference in zip(chosen, preferences, strict=True)
        ]
        yield Task(number=number, documents=tuple(parts))
