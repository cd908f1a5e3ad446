"""One learner: Stable-Baselines3's PPO, its buffer filled with rollouts of real decoding.

Shape suffixes: K decisions, T tokens, D = F + C + 1 observation columns (features, outlook,
log λ), F features, C columns of outlook, H hidden units, A actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger

from offramp.agents.learning.actor import (
    JumpActor,
    actor_options,
    folded_layers,
    router_of,
    start_layer,
)
from offramp.agents.learning.export import Normaliser, Weights
from offramp.agents.learning.jump_ppo import JumpAgent, invalid_actions
from offramp.agents.learning.stopping_problem import StoppingProblem
from offramp.agents.onpolicy.collector import PolicyVersion
from offramp.agents.onpolicy.rollout import UNKNOWN, DecodedRollout
from offramp.agents.training.resuming import segment_seed
from offramp.controller.features import OUTLOOK_V1, FloatArray, IntArray
from offramp.controller.policies.router import MlpRouter


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """How the learner updates.

    Attributes:
        learning_rate: Adam's, which stays constant.
        epochs: Passes over each update's rollouts.
        batch: Decisions per gradient step.
        discount: γ between tokens; within a token nothing is discounted.
        gae_lambda: λ of generalised advantage estimation, between tokens.
        entropy: Weight of the entropy bonus.
        seed: Seeds the order in which decisions are learned from.
    """

    learning_rate: float = 3e-4
    epochs: int = 4
    batch: int = 2048
    discount: float = 0.9
    gae_lambda: float = 0.9
    entropy: float = 0.001
    seed: int = 0


class RolloutPPO(PPO):  # type: ignore[misc]  # mypy skips stable_baselines3
    """PPO that is given its rollouts; it has spaces and no environment.

    Args:
        columns: Number D of observation columns.
        actions: Number A of actions.
        options: Passed on as SB3's ``policy_kwargs``.
        config: Settings of the updates.
    """

    def __init__(
        self, columns: int, actions: int, options: dict[str, Any], config: LearnerConfig
    ) -> None:
        super().__init__(
            JumpActor,
            None,
            learning_rate=config.learning_rate,
            n_steps=2,
            batch_size=config.batch,
            n_epochs=config.epochs,
            ent_coef=config.entropy,
            policy_kwargs=options,
            seed=config.seed,
            device="cpu",
            _init_setup_model=False,
        )
        self.n_envs = 1
        self.observation_space = Box(-np.inf, np.inf, (columns,), np.float32)
        self.action_space = Discrete(actions)
        self._setup_model()

    def update(self, buffer: RolloutBuffer) -> None:
        """One PPO update on a full buffer."""
        self.rollout_buffer = buffer
        self.num_timesteps += buffer.buffer_size
        self.train()


class Learner:
    """Turns rollouts into updates of a warm-started agent, which now also reads the outlook.

    Args:
        agent: Trained on traces; its decisions are the first version's, for the outlook's weights
            begin at 0.
        problem: What its tokens cost.
        config: Settings of the updates.
        logger: Where SB3 writes its scalars.

    Attributes:
        version: Version of the policy: one more with each update.
    """

    def __init__(
        self, agent: JumpAgent, problem: StoppingProblem, config: LearnerConfig, logger: Logger
    ) -> None:
        self.agent = agent
        self.problem = problem
        self.config = config
        self.normaliser = _widened(agent.normaliser)
        old: JumpActor = agent.model.policy
        options = actor_options(
            self.normaliser,
            agent.schema.index("depth"),
            agent.exits,
            agent.layers,
            invalid_actions(problem.exits, problem.jumps),
        )
        columns = len(self.normaliser.mean_F)
        self.model = RolloutPPO(columns, problem.jumps + 1, options, config)
        self.model.set_logger(logger)
        _copy_actor(old, self.model.policy)
        self.version = 1

    def policy(self) -> PolicyVersion:
        """The present weights, as collectors take them."""
        first, *rest, last = folded_layers(self.model.policy, self.normaliser)
        features = len(first[0]) - OUTLOOK_V1.width - 1
        reach = min(self.problem.jumps, self.problem.exits)
        weight_HA, bias_A = last
        routing: Weights = [first, *rest, (weight_HA[:, : reach + 1], bias_A[: reach + 1])]
        start = start_layer(weight_HA, bias_A, self.problem.exits)
        starting: Weights = [(first[0][features:], first[1]), *rest, start]
        return PolicyVersion(version=self.version, routing=routing, starting=starting)

    def router(self, preference: float, candidates_VK: IntArray | None = None) -> MlpRouter:
        """The present policy at one preference λ, in numpy; it reads the outlook."""
        return router_of(
            self.model.policy,
            self.normaliser,
            preference,
            self.agent.exits,
            self.agent.schema,
            candidates_VK,
        )

    def learn(self, rollouts: Sequence[DecodedRollout]) -> dict[str, float]:
        """One update; what the rollouts were like, by name.

        Raises:
            ValueError: no token of theirs was judged.
        """
        # No checkpoint keeps a generator's state: what is drawn is a function of seed and version.
        self.model.set_random_seed(segment_seed(self.config.seed, "onpolicy", self.version))
        judged = [judged_part(rollout) for rollout in rollouts]
        buffer = self._buffer([each for each in judged if len(each.action_K)])
        self.model.update(buffer)
        self.version += 1
        return self._summary(judged)

    def state(self) -> dict[str, Any]:
        """Everything that an update changes, as a checkpoint holds it."""
        policy = self.model.policy
        return {
            "version": self.version,
            "updates": self.model._n_updates,
            "actor": policy.state_dict(),
            "optimiser": policy.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where a state was taken."""
        self.version, self.model._n_updates = state["version"], state["updates"]
        self.model.policy.load_state_dict(state["actor"])
        self.model.policy.optimizer.load_state_dict(state["optimiser"])

    def _buffer(self, rollouts: Sequence[DecodedRollout]) -> RolloutBuffer:
        obs_KD = np.concatenate([each.obs_KD for each in rollouts])
        with torch.no_grad():
            values = self.model.policy.predict_values(torch.from_numpy(obs_KD))[:, 0].numpy()
        cuts = np.cumsum([len(each.action_K) for each in rollouts])[:-1]
        advantages = [
            advantages_of(
                rewards_of(rollout, self.problem),
                values_K,
                rollout.ends_K,
                self.config.discount,
                self.config.gae_lambda,
            )
            for rollout, values_K in zip(rollouts, np.split(values, cuts), strict=True)
        ]
        space, actions = self.model.observation_space, self.model.action_space
        buffer = RolloutBuffer(len(obs_KD), space, actions, "cpu")
        buffer.observations = obs_KD[:, None]
        buffer.actions = np.concatenate([each.action_K for each in rollouts])[:, None, None]
        buffer.log_probs = np.concatenate([each.log_prob_K for each in rollouts])[:, None]
        buffer.values = values[:, None]
        buffer.advantages = np.concatenate(advantages).astype(np.float32)[:, None]
        buffer.returns = buffer.advantages + buffer.values
        buffer.full = True
        return buffer

    def _summary(self, rollouts: Sequence[DecodedRollout]) -> dict[str, float]:
        taken = np.concatenate([each.taken_T for each in rollouts])
        costs = np.concatenate([token_costs(each, self.problem) for each in rollouts])
        rewards = [rewards_of(each, self.problem)[each.ends_K] for each in rollouts]
        return {
            "agreement": float(np.concatenate([each.agreed_T for each in rollouts]).mean()),
            "cost": float(costs.mean()),
            "full_share": float((taken == self.problem.exits).mean()),
            "reward": float(np.concatenate(rewards).mean()),
        }


def judged_part(rollout: DecodedRollout) -> DecodedRollout:
    """The tokens up to the first that full depth has not judged."""
    unknown = np.flatnonzero(rollout.agreed_T == UNKNOWN)
    if not len(unknown):
        return rollout
    kept_K = rollout.token_K < unknown[0]
    return replace(
        rollout,
        obs_KD=rollout.obs_KD[kept_K],
        action_K=rollout.action_K[kept_K],
        log_prob_K=rollout.log_prob_K[kept_K],
        token_K=rollout.token_K[kept_K],
        taken_T=rollout.taken_T[: unknown[0]],
        agreed_T=rollout.agreed_T[: unknown[0]],
    )


def token_costs(rollout: DecodedRollout, problem: StoppingProblem) -> FloatArray:
    """What each token cost, in units of a full-depth token's time at batch 1, [T]."""
    decisions_T = np.bincount(rollout.token_K, minlength=len(rollout.taken_T))
    probes_T = decisions_T - 1  # the first decision comes before any probe
    priced_T = problem.costs.price(rollout.taken_T, probes_T, asks_first=True)
    return priced_T.astype(np.float32)


def rewards_of(rollout: DecodedRollout, problem: StoppingProblem) -> FloatArray:
    """(agreement − λ·cost) / (1 + λ) of a token, given to its last decision, [K]."""
    lam = rollout.preference
    token_T = (rollout.agreed_T - lam * token_costs(rollout, problem)) / (1 + lam)
    return np.where(rollout.ends_K, token_T[rollout.token_K], 0).astype(np.float32)


def advantages_of(
    reward_K: FloatArray, value_K: FloatArray, ends_K: np.ndarray, discount: float, smooth: float
) -> FloatArray:
    """Generalised advantages (Schulman et al. 2016, equation 16), of a chain of tokens, [K].

    Between two decisions of a token both γ and λ are 1: what it is worth is known at its end.
    The last decision ends the chain.

    Args:
        reward_K: Reward of each decision.
        value_K: The critic's values.
        ends_K: Whether a decision is its token's last.
        discount: γ between tokens.
        smooth: λ between tokens.
    """
    advantage_K = np.zeros(len(reward_K), np.float32)
    ahead = value_ahead = 0.0
    for k in reversed(range(len(reward_K))):
        gamma, weight = (discount, smooth) if ends_K[k] else (1.0, 1.0)
        error = reward_K[k] + gamma * value_ahead - value_K[k]
        ahead = error + gamma * weight * ahead
        advantage_K[k], value_ahead = ahead, value_K[k]
    return advantage_K


def _widened(normaliser: Normaliser) -> Normaliser:
    """With the outlook's columns, which have natural units, before the last."""
    wide = OUTLOOK_V1.width
    mean_D = np.insert(normaliser.mean_F, -1, np.zeros(wide, np.float32))
    std_D = np.insert(normaliser.std_F, -1, np.ones(wide, np.float32))
    return Normaliser(mean_D.astype(np.float32), std_D.astype(np.float32))


@torch.no_grad()
def _copy_actor(old: JumpActor, new: JumpActor) -> None:
    """All weights; the outlook's inputs begin at 0."""
    target = new.state_dict()
    for name, tensor in old.state_dict().items():
        if "features_extractor" in name:
            continue  # the normaliser, which new was built with
        if tensor.shape != target[name].shape:
            wide = torch.zeros_like(target[name])
            wide[:, : tensor.shape[1] - 1] = tensor[:, :-1]
            wide[:, -1] = tensor[:, -1]
            tensor = wide
        target[name].copy_(tensor)
