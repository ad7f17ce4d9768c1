"""Decoding: every live slot writes on, a few tokens a call.

Randomness depends on the episode and the position only, never on the slot, its neighbours or where a call ends.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.mesh import sharding
from ppojax.models.forward import Params, head_VD, hidden_states, logits
from ppojax.rollout.draw import cut, greedy_choice, record, sample, uniforms
from ppojax.rollout.mismatch import noisy, noisy_hidden
from ppojax.rollout.sampler import SamplerDef, Slots, append, pin, record_shapes
from ppojax.rollout.stop import START
from ppojax.types import Recorded


class Turns(NamedTuple):
    """Where the turn of each slot stands; kept on the host."""

    live_B: jax.Array | np.ndarray  # bool: the policy is writing
    episode_B: jax.Array | np.ndarray  # int32, the seed of the row
    state_B: jax.Array | np.ndarray  # int32, of the stop table
    left_B: jax.Array | np.ndarray  # int32, tokens that the turn may still take


class Segment(NamedTuple):
    """What one call of `decode` wrote."""

    token_BN: jax.Array  # int32
    logp_BN: jax.Array  # float32, log-probability under the distribution that the token was drawn from
    count_B: jax.Array  # int32, tokens written
    live_B: jax.Array  # bool, the turn goes on
    state_B: jax.Array  # int32; the last state: ended by a stop token or string, not by a limit
    recorded: Recorded = Recorded()  # [B, N, ...], what was asked for; of no meaning past the count


def no_turns(count: int) -> Turns:
    """No slot is writing."""
    return Turns(np.zeros(count, bool), *(np.zeros(count, np.int32) for _ in range(3)))


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def decode(
    params: Params, slots: Slots, turns: Turns, key: jax.Array, stop_SV: jax.Array, *, sampler: SamplerDef
) -> tuple[Slots, Segment]:
    """Go on with the turn of every live slot, for a segment at most.

    A turn ends with a stop token or string, at its limit, or at the end of the cache.
    """
    B, N = slots.length_B.shape[0], sampler.segment
    head = head_VD(params).astype(sampler.model.dtype)
    key_B = jax.vmap(lambda e: jax.random.fold_in(key, e))(turns.episode_B)
    slot_B, stopped_state = jnp.arange(B, dtype=jnp.int32), stop_SV.shape[0] - 1

    def step(carry: tuple) -> tuple:
        n, left_B, slots, out = carry
        hidden_BD = slots.hidden_BD
        if sampler.hidden_noise:
            hidden_BD = noisy_hidden(hidden_BD, key_B, slots.length_B, sampler.hidden_noise)
        logits_BV = logits(sampler.model, head, hidden_BD)
        if sampler.logit_noise:
            logits_BV = noisy(logits_BV, key_B, slots.length_B, sampler.logit_noise)
        logits_BV = logits_BV / sampler.temperature
        uniform_B = uniforms(key_B, slots.length_B)
        if sampler.greedy:
            token_B, logp_B = greedy_choice(logits_BV)
        else:
            token_B, logp_B = sample(cut(logits_BV, sampler.cuts), uniform_B)
        new = record(sampler.records, logits_BV, hidden_BD, token_B, logp_B)
        read = hidden_states(sampler.model, params, token_B[:, None], slots.length_B[:, None], slots.cache)
        wrote_B = out.live_B.astype(jnp.int32)
        slots, left_B = append(slots, read, wrote_B, slot_B, sampler), left_B - wrote_B
        state_B = jnp.where(out.live_B, stop_SV[out.state_B, token_B], out.state_B)
        out = Segment(
            out.token_BN.at[:, n].set(jnp.where(out.live_B, token_B, 0)),
            out.logp_BN.at[:, n].set(jnp.where(out.live_B, logp_B, 0.0)),
            out.count_B + wrote_B,
            out.live_B & (state_B != stopped_state) & (slots.length_B < sampler.positions) & (left_B > 0),
            state_B,
            jax.tree.map(lambda kept, new: kept.at[:, n].set(new), out.recorded, new),
        )
        return n + 1, left_B, slots, out

    def room(kept: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.zeros(kept.shape, kept.dtype), sharding(sampler.mesh, ("rows",)))

    out = Segment(
        jnp.zeros((B, N), jnp.int32),
        jnp.zeros((B, N), jnp.float32),
        jnp.zeros(B, jnp.int32),
        jnp.asarray(turns.live_B) & (slots.length_B < sampler.positions) & (turns.left_B > 0),
        jnp.asarray(turns.state_B),
        jax.tree.map(room, record_shapes(sampler, B, N)),
    )
    carry = (jnp.int32(0), turns.left_B, slots, out)
    *_, slots, out = jax.lax.while_loop(lambda c: (c[0] < N) & jnp.any(c[3].live_B), step, carry)
    return pin(slots, sampler), out


def begin_turn(turns: Turns, slot: int, episode: int, tokens: int) -> None:
    """Let the policy write a turn of at most `tokens` tokens in a slot."""
    for column, value in zip(turns, (True, episode, START, tokens), strict=True):
        assert isinstance(column, np.ndarray)
        column[slot] = value
