"""One token as a Gymnasium environment. The class docstring is the specification."""

from __future__ import annotations

from offramp.envs.adapters.core_env import CoreEnv
from offramp.envs.cores.token_core import TokenExitCore


class TokenExitEnv(CoreEnv):
    """Leave the model early, or go on to the next exit: one recorded token is one episode.

    ## Observation

    ``Box(float32)`` of F + 1 columns: the features at the present exit, in the order of the
    traces' feature schema, then the weight of latency; with ``energy_range`` one more, the weight
    of energy. The space declares the bounds ±100 for every feature and ±14 for the weights, the
    same for all traces; the columns of ``candidates`` version 1 stay in these tighter ranges:

    | column | meaning | range | unit |
    |---|---|---|---|
    | top1 | candidate softmax: probability of the best | 0 … 1 | probability |
    | margin | best minus second best | 0 … 1 | probability |
    | entropy | of that softmax, divided by ln k | 0 … 1 | share |
    | top_logit | raw score of the best candidate / 10 | −100 … 100 | 10 logits |
    | cosine | hidden state to that of the last probe | −1 … 1 | cosine |
    | norm_change | ln of the norm over that of the last probe | −100 … 100 | nats |
    | agrees | best candidate as at the last probe | 0, 1 | flag |
    | run_length | probes in a row with the same best / E | 0 … 1 | share |
    | top1_change | top1 minus that of the last probe | −1 … 1 | probability |
    | depth | layer / number of layers | 0 … 1 | share |
    | position | token position / context length | 0 … 1 | share |
    | log_lambda | ln λ, weight of latency, constant in an episode | −14 … 14 | nats |
    | log_mu | ln μ, weight of energy; only with ``energy_range`` | −14 … 14 | nats |

    After a jump, "last probe" is the exit jumped from. Traces are recorded with every exit
    probed; what a jump sees is computed from that: ``norm_change`` and ``top1_change`` exactly,
    ``agrees`` exactly unless the best candidate changed more than once on the way, ``cosine`` as
    an estimate. ``offramp.envs.traces.pairs`` has the formulas, docs/environments.md the measured
    errors. Before the first layer (``asks_first``) all features are 0.

    ## Action

    - ``actions="gate"``: ``Discrete(2)``. 0 goes on to the next exit, 1 leaves here.
    - ``actions="jump"``: ``Discrete(1 + J)``. 0 leaves here, j goes to the j-th exit from here,
      which is probed next; those between are neither probed nor paid for. A jump past the last
      exit is full depth, unprobed, however far past. J is ``jumps``, at most (and by default) E.
      With ``asks_first`` the first decision comes before the first layer, at −1 so to say: j goes
      to exit j − 1, J is at most E + 1, and nobody can leave yet: 0 does what 1 does. With
      ``ends`` there is one more action, the last: full depth, unprobed, from wherever it stands.

    ``action_masks()`` [A] (sb3-contrib's name) is True for actions that lead somewhere no
    lower action does; the others stay defined, as said.

    ## Reward

    An episode's undiscounted return (γ = 1) is

        (quality − λ · cost) / (1 + λ)        or, with ``energy_range``,
        (quality − λ · cost − μ · energy) / (1 + λ + μ)

    ``quality`` in [0, 1] is that of the exit it left at (full depth: 1, but see below). ``cost``
    is the measured time in units of a full-depth token's, ``energy`` the same of joules: with n
    decisions made and e layers executed,
    (step + e·layer + (L − e)·fill + head + n·(probe + policy)) / full; a decision before the first
    layer has no probe. Each step pays for having come to the present exit as if leaving there,
    less what was paid before, and for its probe and decision; a step to full depth also pays the
    rest of the way. The last step adds the quality.

    Qualities: ``logprob_gap`` is 1 + clip(gap, −5, 0) / 5 nats; ``agreement`` is 1 if the token is
    the full-depth one, else 0; more in ``offramp.envs.traces.tokens``.

    ## Start

    At the first exit of a token drawn uniformly (``asks_first``: before its first layer), with λ
    drawn log-uniformly from ``lambda_range``, μ from ``energy_range``.
    ``reset(options={"token": row, "lambda": value, "mu": value})`` sets any of them.

    ## End

    ``terminated`` when it leaves, or goes on past the last exit; at most E steps (``asks_first``:
    E + 1). Never truncated. The last observation is the one that the last action answered.

    ## Info

    - each step: ``reward_vector``, float64: this step's quality, −cost and, if the cost table holds
      joules, −energy, unweighted. ``objectives`` names the entries, ``reward_space`` has their
      bounds (as in mo-gymnasium). Without joules there are two: unknown is not 0.
    - each step of jumps but the last, and reset: ``action_mask``, int8 [A].
    - at the end: ``quality``, ``cost`` (full-depth token's time), ``energy`` (full-depth token's
      joules; absent where unknown), ``exit_layer`` (layers executed), ``probes`` (probes paid),
      ``agree`` (0 or 1), ``token`` (row of the traces), ``lambda``, ``mu`` (with
      ``energy_range``).

    ## Arguments

    - ``costs``: measured ``CostTable`` of the model that was recorded.
    - ``traces`` or ``store``: tokens in memory, or the folder of a ``TraceStore``.
    - ``split``: with ``store``, which split; None takes all.
    - ``lambda_range``: lowest and highest λ, within 1e-6 … 1e6; equal for a single one. By
      default (0.01, 1.0).
    - ``quality``: name of a registered quality, by default ``logprob_gap``.
    - ``actions`` (``gate``), ``jumps`` (None: all), ``asks_first`` and ``ends`` (False): see
      Action.
    - ``energy_range``: lowest and highest μ; None, the default, does not weigh energy. Refused if
      the cost table holds no joules.

    Raises ``ConfigError`` for an unusable argument, option or action, ``TraceError`` for unusable
    traces, and ``gymnasium.error.ResetNeeded`` for a step outside an episode.

    ## Example

    >>> import gymnasium as gym, numpy as np, offramp.envs
    >>> from offramp.controller.costs.table import CostTable
    >>> from offramp.controller.features import CANDIDATES_V1
    >>> from offramp.controller.traces import TraceHeader
    >>> token = np.ones((1, 2), np.float32)
    >>> traces = offramp.envs.TokenTraces(
    ...     header=TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=(2, 4), layers=8),
    ...     features_NEF=np.zeros((1, 2, CANDIDATES_V1.width), np.float32),
    ...     softmax_NES=np.ones((1, 2, 3), np.float32), exit_token_NE=np.ones((1, 2), np.int32),
    ...     agree_NE=token, gap_NE=-1 * token, right_NE=token,
    ...     full_right_N=np.ones(1, np.float32), position_N=np.zeros(1, np.int32),
    ...     document_N=np.zeros(1, np.int32),
    ...     documents=("d",),
    ... )
    >>> costs = CostTable(layer_s=1.0, head_s=2.0, probe_s=0.0, policy_s=0.0, fill_s=0.0,
    ...                   step_s=0.0, layers=8, machine="example")
    >>> env = gym.make("offramp/TokenExit-v0", traces=traces, costs=costs, lambda_range=(1, 1))
    >>> obs, info = env.reset(seed=0)
    >>> obs.shape
    (12,)
    >>> obs, paid, terminated, truncated, info = env.step(0)  # go on: pay for 2 layers and head
    >>> round(float(paid), 3), terminated
    (-0.2, False)
    >>> obs, reward, terminated, truncated, info = env.step(1)  # leave after layer 4
    >>> terminated, info["exit_layer"], round(info["cost"], 3), round(info["quality"], 3)
    (True, 4, 0.6, 0.8)
    >>> round(float(paid + reward), 3)  # (0.8 − 1 · 0.6) / (1 + 1)
    0.1

    ## Version history

    - v0: first version; jumps, ``reward_vector`` and the weight of energy were added before the
      first release. Gates draw, observe and reward as before.
    """

    core_type = TokenExitCore
