"""The sampler's state: a fixed number of slots over a static cache, and what reads given tokens into them.

Position s of a slot's cache holds its token at position s, so appending is writing at the slot's length, and a slot can
be cut back by lowering its length. Every call that changes slots takes them over (they are donated) and leaves the
slots that it was not given as they are.

Log-probabilities differ from the trainer's by rounding: by 1e-5 at most in float32 and 0.1 in bfloat16 in the small
models of the tests (docs/sampling_gap.md has what was measured); by nothing with `ppojax.rollout.exact`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppojax.mesh import sharding
from ppojax.models.attention import KeyValue
from ppojax.models.decoder import Hidden
from ppojax.models.forward import ModelDef, Params, hidden_states, positions
from ppojax.rollout.draw import NO_CUTS, Cuts
from ppojax.rollout.mismatch import int8_rounded
from ppojax.types import NO_RECORDS, Recorded, Records

CACHE = (None, "rows", None, "kv_heads", None)  # logical axes of keys and values
ROUTED = (None, "rows", None, None)  # and of the experts that were chosen


class Slots(NamedTuple):
    """The sampler's state: each of B slots holds one row at a time."""

    cache: KeyValue
    hidden_BD: jax.Array  # hidden state of each row's last token
    prompt_BD: jax.Array  # and of the last token of its prompt, from which others of its group go on
    length_B: jax.Array  # int32
    routed_LBSK: jax.Array | None = None  # int16: experts that read the token at each position, where recorded


@dataclass(frozen=True)
class SamplerDef:
    """All that is static in sampling."""

    model: ModelDef
    mesh: jax.sharding.Mesh
    positions: int  # S: positions of a slot's cache
    turn_tokens: int  # tokens of one turn, at most
    segment: int = 32  # N: tokens that one call of `decode` writes in a slot, at most
    temperature: float = 1.0
    cuts: Cuts = NO_CUTS
    greedy: bool = False
    record_experts: bool = False
    records: Records = NO_RECORDS  # what is kept of the distribution that each token was drawn from
    logit_noise: float = 0.0  # see `ppojax.rollout.mismatch`, also for the next two
    hidden_noise: float = 0.0
    int8_cache: bool = False


def record_shapes(sampler: SamplerDef, *before: int) -> Recorded:
    """Shapes and types of what is kept at each action, behind the given axes."""
    records, model = sampler.records, sampler.model

    def shape(width: int, dtype: str) -> jax.ShapeDtypeStruct | None:
        return jax.ShapeDtypeStruct((*before, width), jnp.dtype(dtype)) if width else None

    hidden = shape(model.spec.width if records.hidden else 0, model.dtype)
    return Recorded(shape(records.top_k, "int32"), shape(records.top_k, "float32"), hidden)


@partial(jax.jit, static_argnames=("sampler", "count"))
def empty(params: Params, *, sampler: SamplerDef, count: int) -> Slots:
    """Make `count` slots that hold nothing."""
    S, model = sampler.positions, sampler.model
    token_B1 = jnp.zeros((count, 1), jnp.int32)
    read = jax.eval_shape(lambda p: hidden_states(model, p, token_B1, token_B1), params)
    keys, values = (jnp.zeros((*x.shape[:2], S, *x.shape[3:]), x.dtype) for x in read.key_value)
    routed = None
    if sampler.record_experts:
        assert read.routing is not None, "there are no experts to record"
        L, _, _, K = read.routing.expert_NK.shape
        routed = jnp.full((L, count, S, K), -1, jnp.int16)
    hidden_BD = jnp.zeros((count, model.spec.width), read.hidden_BTD.dtype)
    return pin(Slots(KeyValue(keys, values), hidden_BD, hidden_BD, jnp.zeros(count, jnp.int32), routed), sampler)


def pin(slots: Slots, sampler: SamplerDef) -> Slots:
    """Slots over devices as rows are, heads over `tensor`; always the same, so that nothing is compiled again."""

    def place(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, sharding(sampler.mesh, axes))

    cache = KeyValue(*(place(x, CACHE) for x in slots.cache))
    routed = None if slots.routed_LBSK is None else place(slots.routed_LBSK, ROUTED)
    hidden_BD, prompt_BD = (place(x, ("rows", None)) for x in (slots.hidden_BD, slots.prompt_BD))
    return Slots(cache, hidden_BD, prompt_BD, place(slots.length_B, ("rows",)), routed)


def append(slots: Slots, read: Hidden, count_R: jax.Array, slot_R: jax.Array, sampler: SamplerDef) -> Slots:
    """Write the first `count` of each row's new tokens behind the length of its slot."""
    hidden_RTD, new, routing = read
    new = KeyValue(*map(int8_rounded, new)) if sampler.int8_cache else new
    B, step_T = slots.length_B.shape[0], jnp.arange(hidden_RTD.shape[1], dtype=jnp.int32)
    length_R = slots.length_B.at[slot_R].get(mode="fill", fill_value=0)
    # Positions past the count point outside the cache, where a scatter drops them.
    end = slots.cache.k.shape[2]
    place_RT = jnp.where(step_T[None, :] < count_R[:, None], length_R[:, None] + step_T[None, :], end)
    row_R1 = slot_R[:, None]
    cache = KeyValue(
        slots.cache.k.at[:, row_R1, place_RT].set(new.k, mode="drop"),
        slots.cache.v.at[:, row_R1, place_RT].set(new.v, mode="drop"),
    )
    routed = slots.routed_LBSK
    if routed is not None:
        assert routing is not None
        routed = routed.at[:, row_R1, place_RT].set(routing.expert_NK.astype(jnp.int16), mode="drop")
    last_RD = jnp.take_along_axis(hidden_RTD, jnp.maximum(count_R - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden_BD = slots.hidden_BD.at[jnp.where(count_R > 0, slot_R, B)].set(last_RD, mode="drop")
    return Slots(cache, hidden_BD, slots.prompt_BD, slots.length_B.at[slot_R].add(count_R, mode="drop"), routed)


def _remember(slots: Slots, count_R: jax.Array, slot_R: jax.Array) -> Slots:
    """Keep the hidden states that have just been written as those of prompts."""
    B = slots.length_B.shape[0]
    at_R = jnp.where(count_R > 0, slot_R, B)
    ended_RD = slots.hidden_BD.at[at_R].get(mode="fill", fill_value=0)
    return slots._replace(prompt_BD=slots.prompt_BD.at[at_R].set(ended_RD, mode="drop"))


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def prefill(
    params: Params, slots: Slots, token_RT: jax.Array, count_R: jax.Array, slot_R: jax.Array, *, sampler: SamplerDef
) -> Slots:
    """Begin new rows in the slots `slot_R` with the first `count` of their tokens; a count of 0 leaves a slot alone.

    Rows that fill a batch up have the slot B, which is none.
    """
    at_R = jnp.where(count_R > 0, slot_R, slots.length_B.shape[0])
    slots = slots._replace(length_B=slots.length_B.at[at_R].set(0, mode="drop"))
    read = hidden_states(sampler.model, params, token_RT, positions(token_RT))
    return pin(_remember(append(slots, read, count_R, slot_R, sampler), count_R, slot_R), sampler)


@partial(jax.jit, static_argnames=("sampler", "whole", "prompt"), donate_argnames=("slots",))
def extend(
    params: Params,
    slots: Slots,
    token_RT: jax.Array,
    count_R: jax.Array,
    slot_R: jax.Array,
    *,
    sampler: SamplerDef,
    whole: bool = False,
    prompt: bool = False,
) -> Slots:
    """Append given tokens to the rows in the slots `slot_R`: an observation, or more of a prompt.

    `whole` says that `slot_R` is every slot in order, so that their cache is read where it is, and not copied.
    """
    length_R = slots.length_B.at[slot_R].get(mode="fill", fill_value=0)
    position_RT = length_R[:, None] + jnp.arange(token_RT.shape[1], dtype=jnp.int32)[None, :]
    past = slots.cache if whole else KeyValue(*(jnp.take(x, slot_R, axis=1, mode="clip") for x in slots.cache))
    slots = append(slots, hidden_states(sampler.model, params, token_RT, position_RT, past), count_R, slot_R, sampler)
    return pin(_remember(slots, count_R, slot_R) if prompt else slots, sampler)


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def share(slots: Slots, source_R: jax.Array, target_R: jax.Array, length_R: jax.Array, *, sampler: SamplerDef) -> Slots:
    """Begin new rows in the slots `target_R` with the prompts, `length` long, that the slots `source_R` began with.

    A slot may be its own source: its row then goes back to the end of the prompt.
    """

    def copied(x: jax.Array, axis: int) -> jax.Array:
        taken = jnp.take(x, source_R, axis=axis, mode="clip")
        return x.at[(slice(None),) * axis + (target_R,)].set(taken, mode="drop")

    cache = KeyValue(*(copied(x, 1) for x in slots.cache))
    routed = None if slots.routed_LBSK is None else copied(slots.routed_LBSK, 1)
    prompt_BD = copied(slots.prompt_BD, 0)
    last_RD = prompt_BD.at[target_R].get(mode="fill", fill_value=0)
    hidden_BD = slots.hidden_BD.at[target_R].set(last_RD, mode="drop")
    return pin(
        Slots(cache, hidden_BD, prompt_BD, slots.length_B.at[target_R].set(length_R, mode="drop"), routed), sampler
    )
