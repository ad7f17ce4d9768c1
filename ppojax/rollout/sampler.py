"""The sampler: jitted prefill, extend and decode over a static cache.

Slot s of a row's cache holds its token at position s, so appending is writing at the row's length and a row can be
cut back by lowering its length. Randomness depends on the episode and the position only, never on the slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppojax.mesh import sharding
from ppojax.models.attention import KeyValue
from ppojax.models.decoder import Hidden
from ppojax.models.forward import ModelDef, Params, head_VD, hidden_states, logits
from ppojax.rollout.stop import START
from ppojax.types import NO_RECORDS, Recorded, Records

CACHE = (None, "rows", None, "kv_heads", None)  # logical axes of keys and values
ROUTED = (None, "rows", None, None)  # and of the experts that were chosen
BLOCK = 256  # vocabulary block of the two-level inverse CDF


class Slots(NamedTuple):
    """The sampler's state: one slot a row."""

    cache: KeyValue
    hidden_BD: jax.Array  # hidden state of each row's last token
    length_B: jax.Array  # int32
    routed_LBSK: jax.Array | None = None  # int16: experts that read the token in each slot, where they are recorded


class Turn(NamedTuple):
    """What one call of `decode` wrote."""

    token_BN: jax.Array  # int32
    logp_BN: jax.Array  # float32, log-probability under the distribution that the token was drawn from
    count_B: jax.Array  # int32, tokens written
    stopped_B: jax.Array  # bool, ended by a stop token or string (not by a limit)
    recorded: Recorded = Recorded()  # [B, N, ...], what was asked for; of no meaning past the count


@dataclass(frozen=True)
class SamplerDef:
    """All that is static in sampling."""

    model: ModelDef
    mesh: jax.sharding.Mesh
    slots: int  # S: positions of the cache
    turn_tokens: int  # N: tokens of one turn, at most
    temperature: float = 1.0
    greedy: bool = False
    record_experts: bool = False
    records: Records = NO_RECORDS  # what is kept of the distribution that each token was drawn from


def record_shapes(sampler: SamplerDef, *before: int) -> Recorded:
    """Shapes and types of what is kept at each action, behind the given axes."""
    records, model = sampler.records, sampler.model

    def shape(width: int, dtype: str) -> jax.ShapeDtypeStruct | None:
        return jax.ShapeDtypeStruct((*before, width), jnp.dtype(dtype)) if width else None

    hidden = shape(model.spec.width if records.hidden else 0, model.dtype)
    return Recorded(shape(records.top_k, "int32"), shape(records.top_k, "float32"), hidden)


def record(
    records: Records, logits_BV: jax.Array, hidden_BD: jax.Array, token_B: jax.Array, logp_B: jax.Array
) -> Recorded:
    """Keep what is asked for of the distributions that tokens were drawn from with their log-probabilities."""
    hidden = hidden_BD if records.hidden else None
    if not records.top_k:
        return Recorded(hidden=hidden)
    top_BK, id_BK = jax.lax.top_k(logits_BV, records.top_k)
    drawn_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
    return Recorded(id_BK, (top_BK - drawn_B1) + logp_B[:, None], hidden)


def sample(logits_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw a token of each row by inverting its CDF, first over blocks of the vocabulary, then inside one.

    Two short cumulative sums replace a Gumbel of the vocabulary's size: on CPU about twenty times cheaper.

    Returns:
        Token ids int32 `[B]`, and their log-probabilities float32 `[B]`.
    """
    B, V = logits_BV.shape
    top_B = jnp.max(logits_BV, axis=-1)
    weight_BV = jnp.exp(logits_BV - top_B[:, None])
    weight_BKC = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    mass_BK = jnp.sum(weight_BKC, axis=-1)
    block_B, rest_B, total_B = _invert(mass_BK, uniform_B * jnp.sum(mass_BK, axis=-1))
    inside_BC = jnp.take_along_axis(weight_BKC, block_B[:, None, None], axis=1)[:, 0]
    offset_B, _, _ = _invert(inside_BC, rest_B)
    token_B = block_B * BLOCK + offset_B
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - top_B - jnp.log(total_B)


def _invert(mass_BK: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First index whose running mass exceeds the target, the target left inside it, and the whole mass.

    Rounding may leave the target above the whole mass: the last index that has any mass is taken then. What is left
    of the target is never below 0, which would find an index without mass.
    """
    running_BK = jnp.cumsum(mass_BK, axis=-1)
    index_K = jnp.arange(mass_BK.shape[1], dtype=jnp.int32)
    last_B = jnp.max(jnp.where(mass_BK > 0, index_K[None, :], 0), axis=-1)
    index_B = jnp.minimum(jnp.sum(running_BK <= target_B[:, None], axis=-1, dtype=jnp.int32), last_B)
    before_B = jnp.take_along_axis(running_BK - mass_BK, index_B[:, None], axis=1)[:, 0]
    return index_B, jnp.maximum(target_B - before_B, 0.0), running_BK[:, -1]


def greedy_choice(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely token of each row and its log-probability."""
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


@partial(jax.jit, static_argnames=("sampler", "group_size"))
def prefill(params: Params, token_PT: jax.Array, length_P: jax.Array, *, sampler: SamplerDef, group_size: int) -> Slots:
    """Read each prompt once and give its keys and values to the `group_size` rows that share it."""
    position_PT = jnp.broadcast_to(jnp.arange(token_PT.shape[1], dtype=jnp.int32), token_PT.shape)
    hidden_PTD, new, routing = hidden_states(sampler.model, params, token_PT, position_PT)
    last_PD = jnp.take_along_axis(hidden_PTD, (length_P - 1)[:, None, None], axis=1)[:, 0]
    room = sampler.slots - token_PT.shape[1]

    def to_rows(x_LPT: jax.Array, axes: tuple[str | None, ...] = CACHE, fill: int = 0) -> jax.Array:
        widths = ((0, 0), (0, 0), (0, room), *((0, 0),) * (x_LPT.ndim - 3))
        x = jnp.repeat(jnp.pad(x_LPT, widths, constant_values=fill), group_size, axis=1)
        return jax.lax.with_sharding_constraint(x, sharding(sampler.mesh, axes))

    routed = None
    if sampler.record_experts:
        assert routing is not None, "there are no experts to record"
        real_PT = position_PT < length_P[:, None]
        routed_LPTK = jnp.where(real_PT[None, :, :, None], routing.expert_NK, -1).astype(jnp.int16)
        routed = to_rows(routed_LPTK, ROUTED, -1)
    return Slots(
        KeyValue(*map(to_rows, new)), jnp.repeat(last_PD, group_size, axis=0), jnp.repeat(length_P, group_size), routed
    )


def append(slots: Slots, read: Hidden, count_B: jax.Array) -> Slots:
    """Write the first `count` of each row's new tokens behind its length."""
    hidden_BTD, new, routing = read
    B, T = hidden_BTD.shape[:2]
    step_T = jnp.arange(T, dtype=jnp.int32)
    end = slots.cache.k.shape[2]
    # Positions past the count point outside the cache, where a scatter drops them.
    slot_BT = jnp.where(step_T[None, :] < count_B[:, None], slots.length_B[:, None] + step_T[None, :], end)
    row_B1 = jnp.arange(B)[:, None]
    cache = KeyValue(
        slots.cache.k.at[:, row_B1, slot_BT].set(new.k, mode="drop"),
        slots.cache.v.at[:, row_B1, slot_BT].set(new.v, mode="drop"),
    )
    routed = slots.routed_LBSK
    if routed is not None:
        assert routing is not None
        routed = routed.at[:, row_B1, slot_BT].set(routing.expert_NK.astype(jnp.int16), mode="drop")
    last_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden_BD = jnp.where((count_B > 0)[:, None], last_BD, slots.hidden_BD)
    return Slots(cache, hidden_BD, slots.length_B + count_B, routed)


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def extend(params: Params, slots: Slots, token_BT: jax.Array, count_B: jax.Array, *, sampler: SamplerDef) -> Slots:
    """Append given tokens (an observation) to live rows; rows with a count of 0 stay as they are."""
    position_BT = slots.length_B[:, None] + jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None, :]
    return append(slots, hidden_states(sampler.model, params, token_BT, position_BT, slots.cache), count_B)


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def decode(
    params: Params,
    slots: Slots,
    active_B: jax.Array,
    episode_B: jax.Array,
    key: jax.Array,
    stop_SV: jax.Array,
    *,
    sampler: SamplerDef,
) -> tuple[Slots, Turn]:
    """Write one turn in every active row, until a stop token or string, the turn's limit or the end of the cache."""
    B, N = active_B.shape[0], sampler.turn_tokens
    head = head_VD(params).astype(sampler.model.dtype)
    key_B = jax.vmap(lambda e: jax.random.fold_in(key, e))(episode_B)
    stopped_state = stop_SV.shape[0] - 1

    def step(carry: tuple) -> tuple:
        n, live_B, state_B, slots, turn = carry
        logits_BV = logits(sampler.model, head, slots.hidden_BD) / sampler.temperature
        uniform_B = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t)))(key_B, slots.length_B)
        token_B, logp_B = greedy_choice(logits_BV) if sampler.greedy else sample(logits_BV, uniform_B)
        new = record(sampler.records, logits_BV, slots.hidden_BD, token_B, logp_B)
        read = hidden_states(sampler.model, params, token_B[:, None], slots.length_B[:, None], slots.cache)
        slots = append(slots, read, live_B.astype(jnp.int32))
        state_B = jnp.where(live_B, stop_SV[state_B, token_B], state_B)
        turn = Turn(
            turn.token_BN.at[:, n].set(jnp.where(live_B, token_B, 0)),
            turn.logp_BN.at[:, n].set(jnp.where(live_B, logp_B, 0.0)),
            turn.count_B + live_B.astype(jnp.int32),
            turn.stopped_B | (live_B & (state_B == stopped_state)),
            jax.tree.map(lambda kept, new: kept.at[:, n].set(new), turn.recorded, new),
        )
        live_B = live_B & (state_B != stopped_state) & (slots.length_B < sampler.slots)
        return n + 1, live_B, state_B, slots, turn

    def room(kept: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.zeros(kept.shape, kept.dtype), sharding(sampler.mesh, ("rows",)))

    turn = Turn(
        jnp.zeros((B, N), jnp.int32),
        jnp.zeros((B, N), jnp.float32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, bool),
        jax.tree.map(room, record_shapes(sampler, B, N)),
    )
    live_B = active_B & (slots.length_B < sampler.slots)
    carry = (jnp.int32(0), live_B, jnp.full(B, START, jnp.int32), slots, turn)
    *_, slots, turn = jax.lax.while_loop(lambda c: (c[0] < N) & jnp.any(c[1]), step, carry)
    return slots, turn


def pad_tokens(rows: Sequence[Sequence[int]], multiple: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack ragged rows into `[B, T]`, T the longest rounded up to a multiple but not over the limit."""
    longest = max(max(map(len, rows), default=1), 1)
    width = min(-(-longest // multiple) * multiple, max(limit, longest))
    token_BT = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(token_BT, rows, strict=True):
        row[: len(ids)] = ids
    return token_BT, np.array([len(ids) for ids in rows], np.int32)
