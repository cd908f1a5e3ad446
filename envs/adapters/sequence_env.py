"""A sequence as a Gymnasium environment. The class docstring is the specification."""

from __future__ import annotations

from offramp.envs.adapters.core_env import CoreEnv
from offramp.envs.cores.sequence_core import SequenceExitCore


class SequenceExitEnv(CoreEnv):
    """Decode a run of recorded tokens of one document in order, carrying the debt exits leave.

    Within a token this is ``TokenExitEnv``. Between tokens a row remembers what it skipped: under
    projected keys and values that costs quality later, under deferred ones time.

    ## Observation

    ``Box(float32)`` of F + 8 + 1 columns: the features at the present exit as in ``TokenExitEnv``
    (also after jumps), then the outlook (schema ``outlook`` version 1), then the weight of latency;
    with ``energy_range`` one more, the weight of energy. Declared bounds: ±100, weights ±14.

    | column | meaning | range | unit |
    |---|---|---|---|
    | step | tokens emitted so far, the prompt's own one counted / 256 | 0 … | 256 tokens |
    | left | tokens still to come, this one counted / 256 | 0 … | 256 tokens |
    | pending | pending tokens / the most allowed (``defer``; else 0) | 0 … 1 | share |
    | debt | moving average (0.9) of the share of layers its tokens skipped | 0 … 1 | share |
    | acceptance | 1: only drafts and policies that learn while serving get verdicts | 1 | share |
    | last_depth | layers of the last token / number of layers | 0 … 1 | share |
    | active | rows in the batch / most of ``rows`` | 0 … 1 | share |
    | waiting | 0: no queue is modelled | 0 | slots |
    | log_lambda | ln λ, weight of latency, constant in an episode | −14 … 14 | nats |
    | log_mu | ln μ, weight of energy; only with ``energy_range`` | −14 … 14 | nats |

    ## Action

    As of ``TokenExitEnv``; ``jump`` is the default.

    ## Reward

    The undiscounted return (γ = 1) is the sum over tokens of

        (quality − λ · cost) / (1 + λ)        or (quality − λ · cost − μ · energy) / (1 + λ + μ)

    with quality and cost as of ``TokenExitEnv``, but for what debt does to them:

    - ``kv_mode="project"``: the traces were decoded with an exact cache, which exits do not leave.
      Every quality, full depth's too, is multiplied by 1 − c · D^p, where c is ``debt_loss``, p
      ``debt_power`` and D the debt that this token reads: the moving average (0.9) of the layers
      skipped *below the exit where it leaves*, over all layers. At the first exit D is 0, since
      every token ran the layers up to there; at full depth it is the debt observed. This is a
      *model*: blind to attention and to what is further back than some ten tokens, and the
      features stay those of the exact cache. Its two numbers are fitted on-policy
      (``benchmarks/debt.py``; docs/environments.md has the fit and its errors).
    - ``kv_mode="defer"``: the cache is exact, qualities are the recorded ones. Instead, a token
      that left after layer e is postponed, and runs its deeper layers with the row's next token
      that comes past e, as far as that one goes. A layer with m pending tokens aboard costs what
      the cost table's spans say of 1 + m tokens (or 1 + m · ``pending_share`` layers). Once
      ``max_pending`` tokens are pending the next one runs all layers unasked, within the same
      step, which then pays for both. Nothing is filled. What is still pending at the end is
      never run.

    With n = ``rows`` > 1 a row pays the n-th part of the launch: the others are taken to stay, so
    leaving alone saves the share, not the layer. Pending tokens are the row's own account.

    ## Start

    At the first exit (``asks_first``: before the first layer) of the first token of a run, drawn
    uniformly from all runs of ``horizon`` tokens within a document (a shorter document is one run),
    with number of rows, λ and μ drawn. No debt: the prompt before it ran all layers.
    ``reset(options={"token": row, "lambda": value, "mu": value})`` sets any of them.

    ## End

    ``terminated`` after the last token of the run. Never truncated: ``left`` tells when it ends.
    The last observation is the one that the last action answered.

    ## Info

    - each step: ``reward_vector`` as of ``TokenExitEnv``; of jumps, ``action_mask``, too.
    - at the end: means over tokens of ``quality``, ``cost``, ``energy`` (absent where unknown),
      ``exit_layer``, ``probes`` and ``agree`` (expected, debt counted); ``tokens``; ``unasked``,
      how many of them ran all layers unasked; ``token``, the run's first row of the traces;
      ``lambda``, ``mu``.

    ## Arguments

    - ``horizon``: tokens of an episode at most, by default 64.
    - ``kv_mode`` (``project``), ``debt_loss`` (0.215), ``debt_power`` (0.5), ``max_pending`` (8),
      ``pending_share`` (None): see Reward.
    - ``rows``: numbers of rows in the batch, one drawn per episode, by default (1,); the cost table
      must hold them.
    - all others: as of ``TokenExitEnv``.

    Raises ``ConfigError`` for an unusable argument, option or action, ``TraceError`` for traces
    of a single document, out of order, or otherwise unusable, and
    ``gymnasium.error.ResetNeeded`` for a step outside an episode.

    ## Example

    >>> import gymnasium as gym, numpy as np, offramp.envs
    >>> from offramp.controller.costs.table import CostTable
    >>> from offramp.controller.features import CANDIDATES_V1
    >>> from offramp.controller.traces import TraceHeader
    >>> tokens = np.ones((4, 2), np.float32)  # two documents of two tokens, two exits
    >>> traces = offramp.envs.TokenTraces(
    ...     header=TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=(2, 4), layers=8),
    ...     features_NEF=np.zeros((4, 2, CANDIDATES_V1.width), np.float32),
    ...     softmax_NES=np.ones((4, 2, 3), np.float32), exit_token_NE=np.ones((4, 2), np.int32),
    ...     agree_NE=tokens, gap_NE=0 * tokens, right_NE=tokens,
    ...     full_right_N=np.ones(4, np.float32), position_N=np.array([0, 1, 0, 1], np.int32),
    ...     document_N=np.array([0, 0, 1, 1], np.int32), documents=("a", "b"),
    ... )
    >>> costs = CostTable(layer_s=1.0, head_s=2.0, probe_s=0.0, policy_s=0.0, fill_s=0.0,
    ...                   step_s=0.0, layers=8, machine="example")
    >>> env = gym.make("offramp/SequenceExit-v0", traces=traces, costs=costs, horizon=2,
    ...                debt_loss=0.5, debt_power=1, lambda_range=(1, 1))
    >>> obs, info = env.reset(seed=0)
    >>> obs.shape, info["action_mask"].tolist()
    ((20,), [1, 1, 1])
    >>> obs, reward, terminated, truncated, info = env.step(0)  # leave after layer 2 of 8
    >>> round(float(reward), 3), terminated  # (1 − 1 · 0.4) / (1 + 1)
    (0.3, False)
    >>> debt = float(obs[14])  # a tenth of six eighths of the layers
    >>> round(debt, 3)
    0.075
    >>> obs, reward, terminated, truncated, info = env.step(2)  # all layers, unprobed
    >>> round(float(reward), 5), round((1 - 0.5 * debt - 1 * 1) / 2, 5), terminated
    (-0.01875, -0.01875, True)
    >>> info["tokens"], info["exit_layer"]
    (2, 5.0)

    ## Version history

    - v0: first version.
    """

    core_type = SequenceExitCore
