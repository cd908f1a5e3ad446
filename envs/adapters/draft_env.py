"""Drafting and verifying as Gymnasium environments; the first docstring is the specification."""

from __future__ import annotations

from offramp.envs.adapters.core_env import CoreEnv
from offramp.envs.adapters.vector_env import CoreVectorEnv
from offramp.envs.cores.draft_core import DraftExitCore


class DraftExitEnv(CoreEnv):
    """Lossless decoding: draft tokens from early exits, and choose when full depth verifies them.

    An episode follows the recorded tokens of one document through cycles of the engine's
    ``verify`` mode. A cycle is some drafts and one deep pass. Each draft ran the layers up to its
    exit; the deep pass runs all layers of the newest token and takes the open drafts along, each
    from its own exit, so that every token runs every layer once. A deep pass over k open drafts
    of which the first r are right makes r + 1 tokens certain: the r drafts, and full depth's own
    token after them. With r < k the row rolls back: the drafts after the r-th are lost, and what
    their layers cost is lost with them. The tokens are those of full depth whatever is done.

    Exits may also be on a copy of the layers in fewer bytes, listed first (``Exit(12, "int4")``). A
    draft there is a token's run through the copy's layers alone; what it computed is thrown away,
    so that the token counts as standing at depth 0 for the deep pass. From an exit on the copy a
    token may go on to a deeper one there, or to one of the model's own layers, which it then runs
    from the embedding on; never back. The copy reads an entry of every open draft at every layer:
    those that a draft left out, because it left early, are filled by projection, each once.

    A token that joins the newest one at depth d widens each launch from there on; launches of
    several tokens have their own measured price. If two open drafts stand at depths 6 and 3 and
    the newest token goes to 9, layers 0-2 run one token, 3-5 two, and 6-8 three.

    ## Observation

    ``Box(float32)`` of 18 columns, bounds ±100 for all; where it is not asked at an exit the
    features are 0.

    | columns | meaning | range |
    |---|---|---|
    | 7 features | SOFTMAX_V2's at this exit; position is left at 0 | 0 … 1 |
    | 8 outlook | OUTLOOK_V1's, of one row alone: active 1, waiting 0 | 0 … 100 |
    | odds | log-odds that this exit's token is right, by ``odds``, / 4 | -2 … 2 |
    | trust | product of the open drafts' chances of being right; 1 without any | 0 … 1 |
    | place | 0 before the first layer, (i + 1) / E at exit i | 0 … 1 |

    ``agrees`` and ``run_length`` compare with the exit asked at last, as the engine's probe does,
    whatever was jumped over; an exit of the model's own layers is not compared to one on the copy.
    Exits on the copy show what it says after verified tokens; that its drafts also read what it
    said of open ones was not recorded. Tokens after a wrong draft show the features of the recorded
    text: what the engine would see there, on a wrong path, was not recorded.

    ## Action

    ``Discrete(E + 1)``. Before the first layer, a < E asks first at exit a. At exit i, 0 leaves
    with a draft, k asks next at exit i + k; a jump past the last exit verifies. E verifies now:
    all layers, unasked, from wherever it stands. ``action_mask`` in the info leaves out the jumps
    past the last exit.

    With ``max_pending`` drafts open, and at a document's last token, all layers run unasked, as
    in the engine.

    ## Reward

    The aim is the ratio of two sums, tokens / seconds. A ratio is no sum of rewards, but
    (Dinkelbach 1967) the policy with the best ratio ρ* is the one whose best
    E[tokens − ρ* · seconds] is 0; this is also the average-reward (semi-Markov) criterion with ρ
    the gain. So each step gives, undiscounted,

        reward = tokens that became certain − ρ · seconds / full

    with seconds measured (``CostTable``: layers and head by tokens in the launch, probe,
    decision, what a token pays besides) and ``full`` those of one full-depth token, so that ρ and
    its optimum are speed-ups over full depth. ``set_rate`` moves ρ: to the rate that the policy
    earns, after each rollout, which converges to ρ*. The first decision of a token costs one
    decision, each exit asked at one probe and one decision. ``reward_vector`` in the info holds
    tokens and −seconds / full.

    ## Start

    At a token drawn uniformly from all but the last ones of their documents, before its first
    layer, without open drafts. ``reset(options={"token": row})`` sets it.

    ## End

    ``terminated`` when the document's last token is certain, or after ``cycles`` cycles. Never
    truncated.

    ## Info

    At the end: ``tokens``, ``cycles``, ``drafts``, ``accepted`` (of them), ``asked`` (probes),
    ``layer_calls`` (layers run, summed over tokens), ``copy_calls`` (those of the copy),
    ``seconds``.

    ## Arguments

    - ``costs``: measured ``CostTable`` of the model that was recorded, with launches of up to
      ``max_pending`` + 1 tokens and SOFTMAX_V2's probe (CANDIDATES_V1's, if headless), and with
      the copy that exits are on; or a table of constants.
    - ``traces`` or ``store``: tokens in memory, or the folder of a ``TraceStore``. With
      ``CandidateDrafts`` the problem is headless: an exit's token is its best candidate, the
      first three features are confidence among the candidates, and no draft costs a head.
    - ``split``: with ``store``, which split; None takes all.
    - ``max_pending``: drafts that may be open.
    - ``cycles``: cycles in an episode at most; None: to the document's end.
    - ``rate``: ρ at first.
    - ``odds``: log-odds at which each exit's token is held to be right, [N, E], as
      ``DraftChances.odds_of`` gives them; None takes those of its top1.

    Raises ``ConfigError`` for an unusable argument, option or action, ``TraceError`` for unusable
    traces, and ``gymnasium.error.ResetNeeded`` for a step outside an episode.

    ## Example

    >>> import gymnasium as gym, numpy as np, offramp.envs
    >>> from offramp.controller.costs.table import CostTable
    >>> from offramp.controller.features import CANDIDATES_V1
    >>> from offramp.controller.traces import TraceHeader
    >>> right = np.array([[1], [0], [1], [1]], np.float32)  # of four tokens at one exit
    >>> traces = offramp.envs.TokenTraces(
    ...     header=TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=(2,), layers=8),
    ...     features_NEF=np.zeros((4, 1, CANDIDATES_V1.width), np.float32),
    ...     softmax_NES=np.full((4, 1, 3), 0.5, np.float32),
    ...     exit_token_NE=np.ones((4, 1), np.int32), agree_NE=right, gap_NE=right - 1,
    ...     right_NE=right, full_right_N=np.ones(4, np.float32),
    ...     position_N=np.arange(4, dtype=np.int32), document_N=np.zeros(4, np.int32),
    ...     documents=("d",),
    ... )
    >>> costs = CostTable(layer_s=1.0, head_s=2.0, probe_s=2.0, policy_s=0.0, fill_s=0.0,
    ...                   step_s=0.0, layers=8, machine="example")
    >>> env = gym.make("offramp/DraftExit-v0", traces=traces, costs=costs, rate=1.0)
    >>> obs, info = env.reset(seed=0, options={"token": 0})
    >>> obs.shape, int(env.action_space.n)
    ((18,), 2)
    >>> obs, reward, *_ = env.step(0)  # ask at the only exit: two layers and a probe of 10 s
    >>> round(reward, 2), round(float(obs[0]), 2)
    (-0.4, 0.5)
    >>> obs, reward, *_ = env.step(0)  # leave: a draft, which happens to be right
    >>> round(reward, 2)
    0.0
    >>> obs, reward, *_, info = env.step(1)  # verify now: layers 0-7, the draft joins at 2
    >>> round(reward, 2), info["reward_vector"].tolist()  # the draft and one more token
    (1.0, [2.0, -1.0])

    ## Version history

    - v0: first version.
    """

    core_type = DraftExitCore
    core: DraftExitCore

    def set_rate(self, rate: float) -> None:
        """Move ρ, the tokens that a full-depth token's time is worth, from the next step on."""
        self.core.set_rate(rate)


class DraftExitVectorEnv(CoreVectorEnv):
    """``DraftExitEnv`` for ``num_envs`` episodes in one vectorised core; see there."""

    core_type = DraftExitCore
    core: DraftExitCore

    def set_rate(self, rate: float) -> None:
        """Move ρ, the tokens that a full-depth token's time is worth, from the next step on."""
        self.core.set_rate(rate)
