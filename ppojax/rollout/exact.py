"""The trainer's own computation has the last word on what the sampler draws.

Decoding reads one token at a time behind a cache, the trainer whole rows: the same sums in another order, by other
programs. Logits then differ by some 20 to 40 units in the last place (ulp) of a row's largest one
(docs/sampling_gap.md). With a `Judge` decoding only proposes. When a turn is over, its row goes through the trainer's
computation in the trainer's shapes: the recorded log-probabilities are from there, and every token is drawn again, from
the same uniform number. Where another one comes out, it is taken, what was written behind it is dropped, and decoding
goes on from there. So a turn is drawn from the trainer's distribution, whatever decoding did (as in speculative
decoding, arXiv 2211.17192, with draws that are coupled by the uniform number).

What is recorded equals `logp_old` to the bit. The update's forward pass is within 4 ulp of a row's largest logit: with
`remat=full` its blocks are the same computation, and single roundings in the last norm and the log-sum-exp are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.actions import at_actions
from ppojax.kernels import token_stats
from ppojax.mesh import shard_rows
from ppojax.models.forward import ModelDef, Params, action_states, head_VD, logits
from ppojax.rollout.decode import Turns
from ppojax.rollout.draw import record, sample, uniforms
from ppojax.rollout.episode import Episode
from ppojax.rollout.sampler import SamplerDef, Slots, pin
from ppojax.rollout.stop import START
from ppojax.types import Ending, Experience, Layout, Recorded


class Verdict(NamedTuple):
    """A turn as the trainer's distribution has it."""

    token: list[int]  # as it was written, as far as it is drawn again, and then the token that is drawn instead
    logp: list[float]
    recorded: Recorded
    agreed: bool  # the whole turn was drawn again


@dataclass(frozen=True)
class Judge:
    """The trainer's computation and its shapes (static, hashable)."""

    model: ModelDef  # the trainer's
    rows: int  # of a microbatch
    width: int  # positions to which rows are padded
    actions: int  # action positions of a row
    turn_tokens: int  # tokens of a turn, at most

    def __call__(
        self, params: Params, key: jax.Array, sampler: SamplerDef, episodes: Sequence[Episode]
    ) -> list[Verdict]:
        """Draw the last turn of each episode again, of `rows` episodes at most."""
        found = jax.device_get(redraw(params, self._rows(episodes, sampler), key, judge=self, sampler=sampler))
        return [_verdict(episode, jax.tree.map(lambda x, r=r: x[r], found)) for r, episode in enumerate(episodes)]

    def _rows(self, episodes: Sequence[Episode], sampler: SamplerDef) -> Experience:
        """Rows so far, as the trainer packs them, of which the last turn is scored."""
        R, T = self.rows, self.width
        token_RT, index_RA = np.zeros((R, T), np.int32), np.zeros((R, min(self.actions, T)), np.int32)
        seed_R, count_R = np.zeros(R, np.int32), np.zeros(R, np.int32)
        for r, episode in enumerate(episodes):
            start, end = episode.turns[-1].token, len(episode.token)
            token_RT[r, :end], seed_R[r], count_R[r] = episode.token, episode.seed, end
            index_RA[r, : end - start] = range(start, end)
        zero_RT, none_R = np.zeros((R, T), np.float32), np.zeros(R, np.int32)
        rows = {
            "token_BT": token_RT,
            "length_B": count_R,
            "prefix_B": none_R,
            "action_BT": np.zeros((R, T), bool),
            "action_index_BA": index_RA,
            "logp_behavior_BT": zero_RT,
            "reward_BT": zero_RT,
            "ending_B": np.full(R, Ending.TRUNCATED, np.int32),
            "valid_B": np.ones(R, bool),
            "group_B": none_R,
            "episode_B": seed_R,
            "segment_B": none_R,
        }
        return Experience(**shard_rows(rows, sampler.mesh))


class _Drawn(NamedTuple):
    """What came out at each token of a turn, `[R, N]`."""

    token: jax.Array
    logp: jax.Array  # of the token that was written
    recorded: Recorded


@partial(jax.jit, static_argnames=("judge", "sampler"))
def redraw(params: Params, rows: Experience, key: jax.Array, *, judge: Judge, sampler: SamplerDef) -> _Drawn:
    """Score the turns as the actor's update does, and draw their tokens again."""
    model, index_RA = judge.model, rows.action_index_BA
    R, A = index_RA.shape
    N = min(judge.turn_tokens, A)
    hidden_RAD, _ = action_states(model, params, rows, Layout())
    head = head_VD(params).astype(model.dtype)
    stats = token_stats(
        hidden_RAD.reshape(R * A, -1),
        head,
        at_actions(rows.token_BT, index_RA).reshape(R * A),
        entropy=True,  # as the update computes it: this is to be the same program
        temperature=sampler.temperature,
        softcap=model.spec.logit_softcap,
        implementation=model.statistics,
        mesh=model.mesh,
    )

    def draw(row: tuple[jax.Array, ...]) -> tuple[jax.Array, Recorded]:
        hidden_ND, index_N, token_N, logp_N, key = row
        logits_NV = logits(model, head, hidden_ND) / sampler.temperature
        drawn_N, _ = sample(logits_NV, uniforms(jnp.broadcast_to(key, (N,)), index_N))
        return drawn_N, record(sampler.records, logits_NV, hidden_ND, token_N, logp_N)

    key_R = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(rows.episode_B)
    logp_RN, index_RN = stats.logp.reshape(R, A)[:, :N], index_RA[:, :N]
    turns = (hidden_RAD[:, :N], index_RN, at_actions(rows.token_BT, index_RN), logp_RN, key_R)
    drawn_RN, recorded = jax.lax.map(draw, turns)
    return _Drawn(drawn_RN, logp_RN, recorded)


def _verdict(episode: Episode, drawn: _Drawn) -> Verdict:
    wrote = np.array(episode.token[episode.turns[-1].token :], np.int32)
    other = np.flatnonzero(drawn.token[: len(wrote)] != wrote)
    n = int(other[0]) + 1 if len(other) else len(wrote)
    token, kept = drawn.token[:n].tolist(), jax.tree.map(lambda x: x[:n], drawn.recorded)
    return Verdict(token, drawn.logp[:n].tolist(), kept, not len(other))


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def rewind(slots: Slots, slot: jax.Array, length: jax.Array, *, sampler: SamplerDef) -> Slots:
    """Drop what stands in a slot behind its first `length` tokens; the next ones are to be read there."""
    return pin(slots._replace(length_B=slots.length_B.at[slot].set(length)), sampler)


def resume(turns: Turns, slot: int, token: Sequence[int], dropped: int, positions: int, stop_SV: np.ndarray) -> None:
    """Set a slot's turn to where its tokens leave it, after `dropped` ones were taken away; it may be over there."""
    state = START
    for t in token:
        state = int(stop_SV[state, t])
    assert isinstance(turns.live_B, np.ndarray) and isinstance(turns.state_B, np.ndarray)
    assert isinstance(turns.left_B, np.ndarray)
    turns.left_B[slot] += dropped
    turns.state_B[slot] = state
    turns.live_B[slot] = state != len(stop_SV) - 1 and turns.left_B[slot] > 0 and positions > 0
