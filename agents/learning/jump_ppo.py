"""PPO over jumps: which exit to probe next, from a warm start, one net for every preference.

Shape suffixes: S states.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from stable_baselines3 import PPO

from offramp.agents.learning.actor import JumpActor, actor_options, router_of
from offramp.agents.learning.export import Normaliser
from offramp.agents.learning.ppo import PPOConfig, ppo_arguments
from offramp.agents.learning.stopping_problem import START, StateObservations, StoppingProblem
from offramp.agents.learning.warm import WarmConfig, WarmStart
from offramp.controller.costs.table import CostTable
from offramp.controller.features import FeatureSchema, IntArray
from offramp.controller.policies.router import MlpRouter
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.cores.token_core import TokenExitCore
from offramp.envs.traces.pairs import schema_of
from offramp.envs.traces.tokens import TokenTraces


@dataclass(frozen=True, slots=True, kw_only=True)
class JumpConfig:
    """How a jumping agent is trained.

    Attributes:
        jumps: Longest jump, in exits; left out, all are allowed, the end included. 1 is the gate.
        warm: The warm start.
        ppo: What follows; 0 steps leave it out.
    """

    jumps: int | None = None
    warm: WarmConfig = field(default_factory=WarmConfig)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(learning_rate=5e-4, entropy=0.001))


@dataclass(frozen=True, slots=True)
class JumpAgent:
    """A trained actor and what it takes to export it.

    Attributes:
        model: The PPO of Stable-Baselines3 that holds the actor.
        normaliser: Normalises the observation.
        exits: Layers it may ask after.
        adapters: Those among them with an adapter layer.
        layers: Number of layers of the model.
        schema: The features it reads.
        lambda_range: Preferences it was trained for.
    """

    model: PPO
    normaliser: Normaliser
    exits: tuple[int, ...]
    adapters: tuple[int, ...]
    layers: int
    schema: FeatureSchema
    lambda_range: tuple[float, float]

    def router(self, preference: float, candidates_VK: IntArray | None = None) -> MlpRouter:
        """The policy at one preference λ, in numpy."""
        actor: JumpActor = self.model.policy
        return router_of(actor, self.normaliser, preference, self.exits, self.schema, candidates_VK)


def new_agent(traces: TokenTraces, costs: CostTable, config: JumpConfig) -> JumpAgent:
    """An untrained agent on ``offramp/TokenExit-v0`` with jumps, vectorised.

    Raises:
        ConfigError: fewer exits than the jumps need, or costs of another model.
    """
    exits, layers = traces.header.exits, traces.header.layers
    jumps = len(exits) + 1 if config.jumps is None else config.jumps
    token_costs = TokenCosts.of(costs, exits, adapters=traces.header.adapters)
    problem = StoppingProblem(token_costs, jumps)
    ppo = config.ppo
    core = TokenExitCore(
        traces,
        costs,
        num_envs=ppo.envs,
        lambda_range=ppo.lambda_range,
        quality=ppo.quality,
        actions="jump",
        jumps=jumps,
        asks_first=True,
    )
    normaliser = StateObservations(traces, problem.states).normaliser(ppo.lambda_range, ppo.seed)
    schema = schema_of(traces.header)
    options = actor_options(
        normaliser, schema.index("depth"), exits, layers, invalid_actions(len(exits), jumps)
    )
    model = PPO(JumpActor, CoreVecEnv(core), policy_kwargs=options, **ppo_arguments(ppo))
    adapters = traces.header.adapters
    return JumpAgent(model, normaliser, exits, adapters, layers, schema, ppo.lambda_range)


def warm_start(
    agent: JumpAgent, traces: TokenTraces, costs: CostTable, config: JumpConfig
) -> WarmStart:
    """An agent's warm start, at its first step."""
    ppo = config.ppo
    problem = problem_of(agent, costs, config)
    actor: JumpActor = agent.model.policy
    return WarmStart(actor, problem, traces, ppo.quality, ppo.lambda_range, config.warm, ppo.seed)


def problem_of(agent: JumpAgent, costs: CostTable, config: JumpConfig) -> StoppingProblem:
    """The problem that an agent plays."""
    jumps = len(agent.exits) + 1 if config.jumps is None else config.jumps
    token_costs = TokenCosts.of(costs, agent.exits, adapters=agent.adapters)
    return StoppingProblem(token_costs, jumps)


def invalid_actions(exits: int, jumps: int) -> np.ndarray:
    """Which actions lead nowhere: row 0 before the first layer, row s + 1 at exit s."""
    here_S1 = np.arange(START, exits)[:, None]
    action_A = np.arange(jumps + 1)
    invalid_SA: np.ndarray = here_S1 + action_A > exits
    invalid_SA[0, 0] = True  # nobody leaves before the first layer
    return invalid_SA
