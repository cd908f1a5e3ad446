"""Looks at live traffic, and takes one step at a time from drift to a canary."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from offramp.agents.recording.drift import find_drift
from offramp.agents.retraining.learning_state import CALIBRATION, LearningState, record_round
from offramp.agents.retraining.live_traffic import LiveTraffic
from offramp.agents.retraining.retrain_config import RetrainConfig
from offramp.agents.retraining.round_lesson import certify_round, teach_round
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import PolicyRegistry
from offramp.envs.traces.candidate_file import load_candidates
from offramp.envs.traces.store import TraceStore
from offramp.envs.traces.tokens import TokenTraces

CERTIFIED = "certified"
POLICIES = "policies"
TRACES = "traces"
MIXED = "live traffic, and as many documents trained on before"


class Retrainer:
    """One channel's continuous learning.

    Each look takes one step, and what it led to is written down before the next: a process that
    is killed can be started again, and repeats at most the step that it was at.

    Args:
        config: When to train, and on what.
        publisher: Signs the canary.
        registry: Where workers look.

    Raises:
        TraceError: there are no training traces.
        ConfigError: the publisher cannot sign alone, or an earlier state is unreadable.
    """

    def __init__(
        self, config: RetrainConfig, publisher: Publisher, registry: PolicyRegistry
    ) -> None:
        self._config, self._publisher, self._registry = config, publisher, registry
        self._state = LearningState.load(config.out, config.traces.resolve())
        TraceStore.open(self._state.base)
        if not publisher.signer.suffices:
            raise ConfigError(
                "signatures",
                "a release of this channel takes more than this key's, and nobody else signs by "
                "himself",
                "Train and publish by hand: offramp train, calibrate, publish, keys sign",
            )
        self._said = ""

    @property
    def is_under_way(self) -> bool:
        """Whether the next look goes on with a round, without waiting for anything."""
        return self._state.stage in ("recorded", "trained", "certified")

    def look(self) -> str:
        """Take the next step.

        Returns:
            A sentence on what was done, or is waited for; "" if that was said already.

        Raises:
            TraceError: traces are damaged, or no worker keeps traffic that can be learned from.
            RegistryUnavailableError, PromoteConflictError: see ``Publisher``.
        """
        steps = {
            "watching": self._watch,
            "gathering": self._gather,
            "recorded": self._train,
            "trained": self._certify,
            "certified": self._publish,
            "published": self._follow,
        }
        story = steps[self._state.stage]()
        story, self._said = ("" if story == self._said else story), story
        return story

    def _watch(self) -> str:
        config, traffic = self._config, self._traffic()
        fresh = self._fresh(traffic)
        unlearned = [each for each in traffic.chunks if each not in self._state.learned]
        tokens = traffic.tokens(unlearned)
        if config.tokens and tokens >= config.tokens:
            return self._begin(f"{tokens:,} tokens of live traffic were not learned from yet")
        if len(fresh) < config.window:
            return f"waiting for {config.window} requests of live traffic to test"
        found = find_drift(self._reference(), traffic.read(fresh))
        story = (
            f"p = {found.p_value:.3g} over {found.document_counts[1]} requests; most at "
            f"{found.column}, by {found.distance:.2f} (Kolmogorov-Smirnov)"
        )
        if found.p_value <= config.false_alarms:
            return self._begin(f"traffic has drifted from the training traces: {story}")
        self._move(tested=(*self._kept(self._state.tested, traffic), *fresh))
        return f"no drift: {story}"

    def _begin(self, why: str) -> str:
        self._move(stage="gathering", round=self._state.round + 1, why=why)
        return f"{why}; round {self._state.round} begins"

    def _gather(self) -> str:
        config, traffic = self._config, self._traffic()
        # After drift what was tested before is of the traffic that was; it is known already.
        documents = self._fresh(traffic)
        if config.tokens and len(documents) < config.requests:
            documents = [each for each in traffic.chunks if each not in self._state.learned]
        if len(documents) < config.requests:
            return f"waiting for {config.requests} requests to learn from"
        chunks = traffic.load(documents)
        record_round(self._folder / TRACES, Path(self._state.base), chunks, MIXED)
        learned = (*self._kept(self._state.learned, traffic), *chunks)
        self._move(stage="recorded", learned=learned)
        tokens = sum(map(len, chunks.values()))
        return f"{len(chunks)} requests, {tokens:,} tokens of live traffic, are learned from"

    def _train(self) -> str:
        policies = self._folder / POLICIES
        shutil.rmtree(policies, ignore_errors=True)  # of a training that was cut off
        story = teach_round(self._config, self._folder / TRACES, policies, self._state.round)
        self._move(stage="trained")
        return story

    def _certify(self) -> str:
        found = certify_round(self._config, self._folder / TRACES, self._folder / POLICIES)
        if found.bundle is None:
            self._move(stage="watching")
            return found.story
        found.bundle.save(self._folder / CERTIFIED)
        self._move(stage="certified", policy=found.bundle.manifest.digest)
        return found.story

    def _publish(self) -> str:
        config, publisher = self._config, self._publisher
        if not self._is_served():
            if publisher.promoted and publisher.rollout.is_canary:
                return f"waiting for the end of canary {publisher.promoted}"
            bundle = PolicyBundle.load(self._folder / CERTIFIED)
            manifest = bundle.manifest
            training = {**manifest.training, "round": self._state.round, "why": self._state.why}
            release = publisher.release(
                bundle.packed,
                model=manifest.model,
                tokenizer=manifest.tokenizer,
                training=training,
                metrics=manifest.metrics,
                certificate=manifest.certificate,
            )
            publisher.roll_out(config.percent, release.generation)
        self._move(stage="published")
        share = publisher.rollout.percent
        return f"generation {publisher.promoted} serves {share:g}% of the requests, as a canary"

    def _follow(self) -> str:
        publisher = self._publisher
        if not self._is_served():
            self._move(stage="watching")
            return f"generation {publisher.promoted} took its place: the round was in vain"
        if publisher.rollout.is_canary:
            return "the canary is promoted by an operator, or by offramp watch --steps"
        self._move(stage="watching", base=str(self._folder / TRACES))
        return f"generation {publisher.promoted} serves everybody: the round is over"

    def _is_served(self) -> bool:
        """Whether the round's policy is at the head, as it is or as a canary."""
        head = self._registry.head()
        return (
            head is not None
            and head.generation == self._publisher.promoted
            and head.digest == self._state.policy
        )

    def _traffic(self) -> LiveTraffic:
        base = Path(self._state.base)
        header, table_VK = TraceStore.open(base).header, load_candidates(base)
        traffic = LiveTraffic(self._config.traffic, header, table_VK)
        if traffic.others and not traffic.chunks:
            raise TraceError(
                str(self._config.traffic),
                f"holds no traffic that can be compared with {base}: a store {traffic.others[0]}",
                "Serve a policy that asks at all exits of those traces, or name its own (--traces)",
            )
        return traffic

    def _reference(self) -> TokenTraces:
        """The traffic that the served policy was trained for."""
        store = TraceStore.open(self._state.base)
        # A round's training split holds older documents, too; this one is live traffic alone.
        is_round = any(each.split == CALIBRATION for each in store.chunks)
        return store.read(CALIBRATION if is_round else "train")

    def _fresh(self, traffic: LiveTraffic) -> list[str]:
        known = {*self._state.tested, *self._state.learned}
        return [each for each in traffic.chunks if each not in known]

    def _kept(self, documents: Collection[str], traffic: LiveTraffic) -> list[str]:
        return [each for each in documents if each in traffic.chunks]

    @property
    def _folder(self) -> Path:
        return self._config.out / f"round-{self._state.round:04d}"

    def _move(self, **changes: object) -> None:
        self._state = replace(self._state, **changes)  # type: ignore[arg-type]  # fields by name
        self._state.save(self._config.out)
