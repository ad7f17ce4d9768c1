"""Dimensions and the types that flow through a training step.

    P prompts          G rollouts a prompt    B rows           T token positions    S key/cache positions
    V vocabulary       K kept support         D model width    M critics            A action positions of a row

`logp_BT` is an array `[B, T]`; the suffix is the logical shape, also inside `shard_map`. `models/` and `kernels/`
also use N (rows of a matrix), H heads, L layers, F head width, E experts, K experts of a token.

One alignment holds everywhere: at `[:, t]` every per-token array speaks of token t. `logp_BT[:, t]` is the
log-probability of token t given the tokens before it, and `value_MBT[:, :, t]` is the value of the state in which
token t was chosen. The shift by one happens once, in `ppojax.models.forward`.

    tasks -> collect -> Rollout -> pack -> Experience -> score -> Experience -> advantage -> Batch -> steps

Tuples rather than registered dataclasses: they are pytrees without importing jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax
    import numpy as np
Messages = list[dict[str, Any]]


class Records(NamedTuple):
    """What a loss asks the sampler to keep of its distribution at each action (static, hashable)."""

    top_k: int = 0  # this many of the likeliest tokens; 0 for none
    hidden: bool = False  # the final hidden state, from which the head gives the whole distribution


NO_RECORDS = Records()


class Recorded(NamedTuple):
    """What the sampler kept of its distribution, at each action and at nothing else; None for what nobody asked for.

    The leading axes are those of what holds it: a row's actions `[m]`, a turn's tokens `[B, N]`, an experience's action
    positions `[B, A]`. On the host and on the way to it and back, an action costs 8 K bytes for the likeliest tokens
    (160 for 20 of them), and for the hidden state D numbers of the compute type: 4 KiB for bfloat16 at width 2048, so
    4 GiB for a million actions. Both lie on the devices, split by rows, until the step is over.
    """

    top_id: Any = None  # int32[..., K]: the K likeliest tokens, the drawn one among them or not
    top_logp: Any = None  # float32[..., K]: their log-probabilities, at the sampling temperature
    hidden: Any = None  # compute type[..., D]: what the head was multiplied with


class Ending(IntEnum):
    """How a row ended."""

    TERMINATED = 0  # the episode is over: the value of what follows is zero
    TRUNCATED = 1  # a limit was hit: the episode would have gone on
    CUT = 2  # a compaction: the next segment of the same episode goes on
    ERROR = 3  # the environment failed: the row leaves the loss and the group statistics


@dataclass(frozen=True)
class Row:
    """One trainable trace, exactly as it was sampled (length n). Never re-tokenised."""

    token: np.ndarray  # int32[n]
    action: np.ndarray  # bool[n]; True where the policy chose the token
    logp_behavior: np.ndarray  # float32[n]; of the sampling distribution, at its temperature; 0 off action
    reward: np.ndarray  # float32[n]; only on action tokens
    group: int
    episode: int
    segment: int
    ending: Ending
    messages: Messages = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    clipped: bool = False  # a turn ran into its token limit
    routed: np.ndarray | None = None  # int16[n, L, K]; experts that read each token, -1 where nothing is recorded
    recorded: Recorded = field(default_factory=Recorded)  # of the m actions
    hint: np.ndarray | None = None  # int32[h]; what only the critics are shown, before the row
    # Training steps that had been done to the weights which drew its tokens: one number for all of a row's actions, for
    # weights do not change while a step's episodes are played.
    version: int = 0


@dataclass(frozen=True)
class Rollout:
    """What the sampler and the environments produced for one step: ragged, on the host."""

    rows: tuple[Row, ...]
    metrics: dict[str, float] = field(default_factory=dict)

    def episodes(self) -> list[list[Row]]:
        """The rows of each episode, see `episodes_of`."""
        return episodes_of(self.rows)


def episodes_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Put the rows of each episode together, first segment first; episodes in the order of their numbers."""
    segments: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.episode, row.segment)):
        segments.setdefault(row.episode, []).append(row)
    return list(segments.values())


@dataclass(frozen=True)
class Layout:
    """How the rows of an `Experience` lie, as far as a model call can use it (static, hashable).

    Every `group` consecutive rows begin with the same tokens, at most `prefix` of them (`Experience.prefix_B` says how
    many): a model reads those once for the group. `group = 1` says nothing.
    """

    group: int = 1
    prefix: int = 0


class Experience(NamedTuple):
    """Rows aligned and padded to a bucket. The last column is never an action, so `value_MBT` has a place for the
    value of the state after a row's last token."""

    token_BT: jax.Array  # int32
    length_B: jax.Array  # int32: real tokens of the row
    prefix_B: jax.Array  # int32: tokens before the first action, shared by the rows of a group (see `Layout`)
    action_BT: jax.Array  # bool: chosen by the policy, in a row that counts
    action_index_BA: jax.Array  # int32: positions of the action tokens, filled up with 0
    logp_behavior_BT: jax.Array  # float32
    reward_BT: jax.Array  # float32
    ending_B: jax.Array  # int32: an `Ending`
    valid_B: jax.Array  # bool: False for failed rows and for rows that only fill the batch
    group_B: jax.Array  # int32
    episode_B: jax.Array  # int32
    segment_B: jax.Array  # int32
    logp_old_BT: jax.Array | None = None  # float32, filled by score when a component asks for it
    logp_ref_BT: jax.Array | None = None  # float32, likewise
    value_MBT: jax.Array | None = None  # float32, likewise
    routed_BTLK: jax.Array | None = None  # int16: experts that read token t in the sampler, -1 unknown; may be left out
    recorded: Recorded = Recorded()  # of the sampler, at the positions of `action_index_BA`; 0 behind the last action
    hidden_ref_BAD: jax.Array | None = None  # compute type: of the reference policy at each action, likewise scored
    hint_BH: jax.Array | None = None  # int32: tokens that only the critics read, before the row; None where none do
    hint_length_B: jax.Array | None = None  # int32: of them


class Advantage(NamedTuple):
    """What an advantage estimator returns."""

    advantage_BT: jax.Array  # float32, 0 off action
    return_MBT: jax.Array | None = None  # float32, the critics' targets; None when no critic is trained
    explored_BT: jax.Array | None = None  # bool: tokens that an entropy bonus is for; None for all of them


class Batch(NamedTuple):
    """What one optimizer step sees."""

    experience: Experience
    advantage_BT: jax.Array
    return_MBT: jax.Array | None = None
    score_B: jax.Array | None = None  # float32: rewards of the row's episode, all of its rows together
    entropy_BT: jax.Array | None = None  # float32: the entropy bonus of each token, times; None for 1
    written_B: jax.Array | None = None  # float32: action tokens of the row's episode; None where each is one row
    imitated_B: jax.Array | None = None  # float32: what imitation of the row weighs, 0 for none; see `PolicyLoss`


class TokenStats(NamedTuple):
    """Statistics of the policy's next-token distribution at each token, float32."""

    logp: jax.Array  # log-probability of the token that was chosen
    entropy: jax.Array | None = None  # nats, over the whole vocabulary
    kl: jax.Array | None = None  # KL(policy || reference), nats, over the whole vocabulary
    reverse_kl: jax.Array | None = None  # KL(reference || policy)
    tv: jax.Array | None = None  # total variation between them, 0 to 1
    topk_logp: jax.Array | None = None  # log-probabilities of K named tokens, on a last axis K; 0 where none is named
    kl_ref: jax.Array | None = None  # in the update `reference` is the sampler, and this KL(policy || frozen reference)


class Routing(NamedTuple):
    """What the routers of a mixture of experts did, one layer or several (layers then lead every array).

    The sums run over the tokens that count: all but padding.
    """

    expert_NK: jax.Array  # int32: the experts of every token; from a model call [L, B, T, K]
    load_E: jax.Array  # float32: tokens sent to each expert
    probability_E: jax.Array  # float32: sum of the router's probabilities; the only part with a gradient, beside z
    z: jax.Array  # float32: sum of (log sum exp of the router's logits)^2
    agreed: jax.Array  # float32: choices that the router would have made freely too
    tokens: jax.Array  # float32: tokens that count


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that parts of a batch can be added up."""

    sum: jax.Array
    weight: jax.Array


class Max(NamedTuple):
    """A maximum over the parts of a batch."""

    value: jax.Array


Metrics = dict[str, Mean | Max]


class TokenTrace(NamedTuple):
    """What an optimizer step saw of each token, before it moved the policy; 0 off action."""

    ratio_BT: Any  # float32: probability of the policy that is trained over the sampler's, held within exp(+-20)
    mask_BT: Any  # bool: the loss had a gradient in the token's log-probability


class LossOut(NamedTuple):
    """A loss as a sum and the weight to divide it by; `update` divides once, by the weight of the whole minibatch."""

    sum: jax.Array
    weight: jax.Array
    metrics: Metrics
    trace: TokenTrace | None = None  # the actor's step adds it


class TrainState(NamedTuple):
    """Float32 master weights and what the optimizer keeps. `skipped` counts updates refused as non-finite, in all
    and in a row."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32
    skipped: jax.Array  # int32[2]
