"""What a staged run leaves behind: contenders, and the on-policy phase that may follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from stable_baselines3.common.logger import configure

from offramp.agents.learning.jump_ppo import game_of
from offramp.agents.onpolicy.collector import CollectSpec
from offramp.agents.onpolicy.learner import Learner
from offramp.agents.onpolicy.onpolicy import Tokens, run_onpolicy
from offramp.agents.placing.contenders import Contender
from offramp.agents.placing.jump_contenders import JUMPING, fit_state_phat, jump_contenders
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.record import tokenize, window
from offramp.agents.training.staged import StagedRun
from offramp.agents.training.train import load_contenders, save_contenders
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import NeverExit
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.spec import WorkerSpec

ONPOLICY = "PPO on-policy"


def finish(
    run: StagedRun,
    on_round: Callable[[int, int], None] = lambda *_: None,
) -> list[Contender]:
    """Place what was trained, go on on-policy if the settings say so, and save it all.

    The on-policy phase needs Ray to be up. It begins from the agent of the PPO stage, or goes on
    after the last round of the run's checkpoint. Of a finished run the policies that lie in its
    folder are read back; nothing is trained, placed or written.

    Args:
        run: Trained.
        on_round: Told (on-policy rounds done, in all).

    Raises:
        ConfigError: the model or the corpus is not the recorded one, the cluster is too small, or
            a checkpoint cannot be written.
        PolicyRefusedError: a policy of a finished run is damaged.
    """
    if run.finished:
        return load_contenders(run.out)
    config, data = run.config, run.data
    phat = fit_state_phat(data.train, config.phat)
    placed = jump_contenders(data, run.agent, phat, config.targets)
    found = [
        Contender(family="full depth", setting=None, offline_agreement=None, policy=NeverExit()),
        *placed,
    ]
    if config.onpolicy.rounds:
        learner = go_on_policy(run, on_round)
        found += [
            Contender(
                family=ONPOLICY,
                setting=each.setting,
                offline_agreement=None,  # its cache is not the one that was recorded
                policy=learner.router(each.setting, data.candidates_VK),
            )
            for each in placed
            if each.family == JUMPING and each.setting is not None
        ]
    training = asdict(config)
    del training["traces"]  # a place on one machine
    save_contenders(run.out, found, data, training)
    run.reach("done", config.onpolicy.rounds)
    return found


def go_on_policy(run: StagedRun, on_round: Callable[[int, int], None]) -> Learner:
    """The learner after its last round; a checkpoint after each.

    Raises:
        ConfigError: no model is named, it is another than was recorded, or a checkpoint cannot be
            written.
    """
    config, data = run.config.onpolicy, run.data
    if not config.model:
        raise ConfigError("onpolicy.model", "is not named", "Give the folder that was recorded")
    names = [] if not run.config.tensorboard else ["tensorboard"]
    logger = configure(str(run.out / "onpolicy"), names)
    game = game_of(run.agent, data.costs, run.config.jump)
    learner = Learner(run.agent, game, config.learner, logger)
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
    return CollectSpec(
        worker=WorkerSpec(
            model=config.model,
            threads=run.config.threads,
            slots=config.together,
            engine=EngineConfig(),
        ),
        exits=run.agent.exits,
        schema=run.agent.schema,
        kv_mode="defer" if config.kv_mode == "defer" else "project",
        prompt_tokens=config.prompt_tokens,
        model=run.data.facts.model,
        seed=run.config.seed,
    )
