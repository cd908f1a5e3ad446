"""The on-policy phase of a staged run: collectors decode with real exits, one learner updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stable_baselines3.common.logger import configure

from offramp.agents.learning.jump_ppo import problem_of
from offramp.agents.onpolicy.collector import CollectSpec
from offramp.agents.onpolicy.learner import Learner
from offramp.agents.onpolicy.onpolicy import Tokens, run_onpolicy
from offramp.agents.recording.corpus import load_corpus, tokenize, window
from offramp.agents.training.staged import StagedRun
from offramp.agents.training.train_config import adapters_of
from offramp.controller.errors import ConfigError
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.spec import WorkerSpec


def go_on_policy(run: StagedRun, on_round: Callable[[int, int], None]) -> Learner:
    """Go through the rounds that are left, with a checkpoint after each.

    It begins from the agent of the PPO stage, or goes on after the last round of the run's
    checkpoint. Ray must be up.

    Args:
        run: A run whose stages on traces are done.
        on_round: Told (rounds done, in all).

    Returns:
        The learner after its last round.

    Raises:
        ConfigError: no model is named, it is another than was recorded, or a checkpoint cannot be
            written.
    """
    config, data = run.config.onpolicy, run.data
    if not config.model:
        raise ConfigError("onpolicy.model", "is not named", "Give the folder that was recorded")
    names = [] if not run.config.tensorboard else ["tensorboard"]
    logger = configure(str(run.out / "onpolicy"), names)
    problem = problem_of(run.agent, data.costs, run.config.jump)
    learner = Learner(run.agent, problem, config.learner, logger)
    if run.learner:
        learner.restore(run.learner)
    if run.step == config.rounds:
        return learner

    def report(number: int, summary: dict[str, float]) -> None:
        for name, value in summary.items():
            logger.record(f"onpolicy/{name}", value)
        logger.dump(number)
        run.reach("onpolicy", number, learner.state())
        on_round(number, config.rounds)

    run_onpolicy(
        learner,
        _spec(run),
        data.candidates_VK,
        training_documents(run),
        run.config.jump.ppo.lambda_range,
        config,
        report,
        run.step,
    )
    return learner


def training_documents(run: StagedRun) -> list[tuple[str, Tokens]]:
    """The recorded training documents, by digest and tokens; validation and test stay unseen.

    Raises:
        ConfigError: the corpus holds none of them.
        TraceError: the corpus cannot be read.
    """
    config = run.config.onpolicy
    corpus = load_corpus(Path(config.corpus) if config.corpus else None, config.corpus_documents)
    recorded = set(run.data.train.documents)
    ours = [document for document in corpus if document.digest in recorded]
    if not ours:
        raise ConfigError(
            "onpolicy.corpus", "holds no document that was recorded", "Name the recorded one"
        )
    length = config.prompt_tokens + config.tokens + 1
    return [
        (document.digest, tuple(window(document, tokens, length)))
        for document, tokens in tokenize(config.model, ours)
    ]


def _spec(run: StagedRun) -> CollectSpec:
    config = run.config.onpolicy
    adapters = adapters_of(run.config, run.data.facts.translators)
    return CollectSpec(
        worker=WorkerSpec(
            model=config.model,
            threads=run.config.threads,
            slots=config.together,
            engine=EngineConfig(translators=adapters and adapters.resolve()),
        ),
        exits=run.agent.exits,
        schema=run.agent.schema,
        kv_mode="defer" if config.kv_mode == "defer" else "project",
        prompt_tokens=config.prompt_tokens,
        model=run.data.facts.model,
        seed=run.config.seed,
    )
