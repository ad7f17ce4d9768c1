"""The sampler's state: a fixed number of slots over a static cache, and what reads given tokens into them.

Position s of a slot's cache holds its token at position s, so appending is writing at the slot's length, and a slot can
be cut back by lowering its length. Every call that changes slots takes them over (they are donated) and leaves the
slots that it was not given as they are.

Log-probabilities differ from the trainer's by rounding: by 1e-5 at most in float32 and 0.1 in bfloat16 in the small
models of the tests (docs/sampling_gap.md has what was measured); by nothing with `ppojax.rollout.exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppojax.mesh import RULES, row_shards, sharding
from ppojax.models.attention import Cache, KeyValue
from ppojax.models.decoder import Hidden
from ppojax.models.forward import ModelDef, Params, hidden_states, positions
from ppojax.rollout.draw import NO_CUTS, Cuts
from ppojax.rollout.mismatch import int8_rounded
from ppojax.types import NO_RECORDS, Recorded, Records

CACHE = (None, "rows", "kv_heads", None, None)  # logical axes of the cache
NEW = (None, "rows", None, "kv_heads", None)  # of keys and values that are new
ROUTED = (None, "rows", None, None)  # and of the experts that were chosen
ROWS = jax.sharding.PartitionSpec(RULES["rows"])  # of what has a leading axis over rows


class Slots(NamedTuple):
    """The sampler's state: each of B slots holds one row at a time."""

    cache: Cache
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
    (L, _, _, heads, F), Fv, dtype = read.key_value.k.shape, read.key_value.v.shape[-1], read.key_value.k.dtype
    cache = Cache(jnp.zeros((L, count, heads, S, F), dtype), jnp.zeros((L, count, heads, S, Fv), dtype))
    routed = None
    if sampler.record_experts:
        assert read.routing is not None, "there are no experts to record"
        L, _, _, K = read.routing.expert_NK.shape
        routed = jnp.full((L, count, S, K), -1, jnp.int16)
    hidden_BD = jnp.zeros((count, model.spec.width), read.hidden_BTD.dtype)
    return pin(Slots(cache, hidden_BD, hidden_BD, jnp.zeros(count, jnp.int32), routed), sampler)


def places(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
    """Where slots lie: over devices as rows do, heads over `tensor`."""

    def place(*axes: str | None) -> Any:
        return sharding(mesh, axes)

    routed = None if slots.routed_LBSK is None else place(*ROUTED)
    row, cache = place("rows", None), Cache(place(*CACHE), place(*CACHE))
    return Slots(cache, row, row, place("rows"), routed)


def pin(slots: Slots, sampler: SamplerDef) -> Slots:
    """Slots where they lie; always the same, so that nothing is compiled again."""
    return jax.tree.map(jax.lax.with_sharding_constraint, slots, places(slots, sampler.mesh))


def append(
    slots: Slots,
    read: Hidden,
    count_R: jax.Array,
    slot_R: jax.Array,
    sampler: SamplerDef,
    *,
    fresh: bool = False,
    prompt: bool = False,
) -> Slots:
    """Write the first `count` of each row's new tokens behind the length of its slot, which is on the row's device.

    With `fresh` they are written at its start, with `prompt` their last hidden states are kept as those of prompts.
    """
    hidden_RTD, new, routing = read
    new = KeyValue(*map(int8_rounded, new)) if sampler.int8_cache else new

    def run(slots: Slots, rows: tuple) -> Slots:
        hidden_RTD, new, expert_LRTK, count_R, slot_R = rows
        B = slots.length_B.shape[0]
        slot_R, step_T = _own(slot_R, B, sampler), jnp.arange(hidden_RTD.shape[1], dtype=jnp.int32)
        length_R = slots.length_B.at[slot_R].get(mode="fill", fill_value=0)
        before_R = jnp.zeros_like(length_R) if fresh else length_R
        # Positions past the count point outside the cache, where a scatter drops them.
        end = sampler.positions
        place_RT = jnp.where(step_T[None, :] < count_R[:, None], before_R[:, None] + step_T[None, :], end)
        row_R1 = slot_R[:, None]
        cache = Cache(
            *(
                held.at[:, row_R1, :, place_RT].set(x.transpose(1, 2, 0, 3, 4), mode="drop")
                for held, x in zip(slots.cache, new, strict=True)
            )
        )
        routed = slots.routed_LBSK
        if routed is not None:
            assert expert_LRTK is not None
            routed = routed.at[:, row_R1, place_RT].set(expert_LRTK.astype(jnp.int16), mode="drop")
        last_RD = jnp.take_along_axis(hidden_RTD, jnp.maximum(count_R - 1, 0)[:, None, None], axis=1)[:, 0]
        at_R = jnp.where(count_R > 0, slot_R, B)
        return Slots(
            cache,
            slots.hidden_BD.at[at_R].set(last_RD, mode="drop"),
            slots.prompt_BD.at[at_R].set(last_RD, mode="drop") if prompt else slots.prompt_BD,
            slots.length_B.at[at_R].set(before_R + count_R, mode="drop"),
            routed,
        )

    held = _specs(slots, sampler.mesh)
    expert_LRTK = None if routing is None or slots.routed_LBSK is None else routing.expert_NK
    given = (ROWS, sharding(sampler.mesh, NEW).spec, held.routed_LBSK, ROWS, ROWS)
    return _apart(run, sampler, (held, given), held)(slots, (hidden_RTD, new, expert_LRTK, count_R, slot_R))


def _specs(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
    return jax.tree.map(lambda place: place.spec, places(slots, mesh))


def _apart(run: Callable[..., Any], sampler: SamplerDef, given: Any, out: Any) -> Callable[..., Any]:
    """Let each device run on the slots that it holds, with rows that are theirs: nothing travels."""
    if row_shards(sampler.mesh) == 1:
        return run
    return jax.shard_map(run, mesh=sampler.mesh, in_specs=given, out_specs=out)


def _own(slot_R: jax.Array, count: int, sampler: SamplerDef) -> jax.Array:
    """Slots as the device numbers them that holds them; `count`, which is none, for those of others."""
    if row_shards(sampler.mesh) == 1:
        return slot_R
    own_R = slot_R - count * jax.lax.axis_index(RULES["rows"])
    return jnp.where((own_R >= 0) & (own_R < count), own_R, count)


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def prefill(
    params: Params, slots: Slots, token_RT: jax.Array, count_R: jax.Array, slot_R: jax.Array, *, sampler: SamplerDef
) -> Slots:
    """Begin new rows in the slots `slot_R` with the first `count` of their tokens; a count of 0 leaves a slot alone.

    Rows that fill a batch up have the slot B, which is none. Rows are split over devices in order, as slots are, and
    each row is on the device that holds its slot (`ppojax.rollout.feed` deals them out so).
    """
    read = hidden_states(sampler.model, params, token_RT, positions(token_RT))
    return pin(append(slots, read, count_R, slot_R, sampler, fresh=True, prompt=True), sampler)


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

    `whole` says that `slot_R` is every slot in order, so that their cache is read where it is, and not copied. Rows are
    where their slots are, as in `prefill`.
    """

    def run(length_B: jax.Array, cache: Cache, slot_R: jax.Array) -> tuple[jax.Array, Cache]:
        own_R = _own(slot_R, length_B.shape[0], sampler)
        taken = Cache(*(jnp.take(x, own_R, axis=1, mode="clip") for x in cache))
        return length_B.at[own_R].get(mode="fill", fill_value=0), taken

    length_R, past = slots.length_B, slots.cache
    if not whole:
        held = _specs(slots, sampler.mesh)
        take = _apart(run, sampler, (ROWS, held.cache, ROWS), (ROWS, held.cache))
        length_R, past = take(length_R, past, slot_R)
    position_RT = length_R[:, None] + jnp.arange(token_RT.shape[1], dtype=jnp.int32)[None, :]
    read = hidden_states(sampler.model, params, token_RT, position_RT, past)
    return pin(append(slots, read, count_R, slot_R, sampler, prompt=prompt), sampler)


@partial(jax.jit, static_argnames=("sampler",), donate_argnames=("slots",))
def share(slots: Slots, source_R: jax.Array, target_R: jax.Array, length_R: jax.Array, *, sampler: SamplerDef) -> Slots:
    """Begin new rows in the slots `target_R` with the prompts, `length` long, that the slots `source_R` began with.

    One after another, those whose target is none last: a slot may be the source of a later one, or its own, whose row
    then goes back to the end of the prompt. Source and target are on one device, where the row is, too.
    """

    def run(slots: Slots, source_R: jax.Array, target_R: jax.Array, length_R: jax.Array) -> Slots:
        B = slots.length_B.shape[0]
        source_R, target_R = _own(source_R, B, sampler), _own(target_R, B, sampler)

        def copied(x: jax.Array, r: jax.Array, axis: int) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(x, source_R[r], axis)
            return jax.lax.dynamic_update_index_in_dim(x, row, target_R[r], axis)

        def one(r: jax.Array, slots: Slots) -> Slots:
            cache = Cache(*(copied(x, r, 1) for x in slots.cache))
            routed = None if slots.routed_LBSK is None else copied(slots.routed_LBSK, r, 1)
            prompt_BD = copied(slots.prompt_BD, r, 0)
            hidden_BD = slots.hidden_BD.at[target_R[r]].set(prompt_BD[target_R[r]])
            return Slots(cache, hidden_BD, prompt_BD, slots.length_B.at[target_R[r]].set(length_R[r]), routed)

        # Row by row, so that no second cache is needed.
        return jax.lax.fori_loop(0, jnp.sum(target_R < B), one, slots)

    held = _specs(slots, sampler.mesh)
    return pin(_apart(run, sampler, (held, ROWS, ROWS, ROWS), held)(slots, source_R, target_R, length_R), sampler)
