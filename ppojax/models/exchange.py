"""Expert parallelism: tokens travel to the devices that hold their experts, and back.

Every device of a mesh routes its own rows. Along the axis `expert` each holds E / X of the experts (X devices), whole
or, over `tensor`, in slices of their hidden units; over `fsdp` they are gathered for the layer, as all weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ppojax.mesh import RULES, row_shards
from ppojax.models.experts import EXPERT_WEIGHTS, Sorting, apply_experts, combine, deal, pick, run_experts
from ppojax.models.grouped import Method
from ppojax.models.spec import Activation

ROWS = RULES["rows"]
Transport = Literal["padded", "ragged"]


def over_mesh(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    weight_NK: jax.Array,
    weights: Mapping[str, jax.Array],
    activation: Activation,
    method: Method,
    mesh: jax.sharding.Mesh,
    transport: Transport | None = None,
) -> jax.Array:
    """`apply_experts` with rows split over data, fsdp and expert, experts over expert, hidden units over tensor.

    `transport` is how tokens travel. padded: `all_to_all` of N_local min(K, E/X) places for each pair of devices, the
    worst case, so that nothing is dropped: a device then holds as many rows as the X devices send in all, X times
    what balanced routing needs. ragged: `ragged_all_to_all` of the rows that there are, into a buffer of that size;
    CPU has none, and it is the default elsewhere.

    Raises:
        ValueError: the experts do not divide over the mesh.
    """
    E, X = weights["expert_gate"].shape[0], mesh.shape["expert"]
    if E % X:
        raise ValueError(f"{E} experts do not divide over mesh.expert = {X}: make mesh.expert a divisor of {E}")
    if transport is None:
        transport = "padded" if mesh.devices.flat[0].platform == "cpu" else "ragged"

    def local(x: jax.Array, expert: jax.Array, weight: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
        if "expert_down_bias" in own:  # each slice of the hidden units gives a part of the sum, the bias is in one
            first = jax.lax.axis_index("tensor") == 0
            own = {**own, "expert_down_bias": jnp.where(first, own["expert_down_bias"], 0)}
        if X == 1:
            y = apply_experts(x, expert, weight, own, activation, method)
        else:
            y = _exchange(x, expert, weight, own, activation, method, _TRANSPORTS[transport], X)
        return jax.lax.psum(y, "tensor") if mesh.shape["tensor"] > 1 else y

    # Filler rows, up to an even split, belong to no expert.
    N, shards = x_ND.shape[0], row_shards(mesh)
    rows = PartitionSpec(ROWS, None)
    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, {name: _spec(name) for name in weights}),
        out_specs=rows,
        check_vma=False,
    )
    fill = ((0, -N % shards), (0, 0))
    padded = (jnp.pad(x_ND, fill), jnp.pad(expert_NK, fill, constant_values=E), jnp.pad(weight_NK, fill))
    return spread(*padded, dict(weights))[:N]


def _spec(name: str) -> PartitionSpec:
    return PartitionSpec(*(None if axis in (None, "embed") else RULES[axis] for axis in EXPERT_WEIGHTS[name]))


class _Journey(NamedTuple):
    """Rows received, the local expert of each (their number for none), and the way back."""

    x_RD: jax.Array
    expert_R: jax.Array
    back: Callable[[jax.Array], jax.Array]


def _exchange(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    weight_NK: jax.Array,
    weights: Mapping[str, jax.Array],
    activation: Activation,
    method: Method,
    transport: Callable[..., _Journey],
    devices: int,
) -> jax.Array:
    own = weights["expert_gate"].shape[0]
    sorting = Sorting(expert_NK.reshape(-1), own * devices)  # by expert, so by device too
    count_X = jnp.sum(sorting.size_E.reshape(devices, own), axis=1, dtype=jnp.int32)
    places = x_ND.shape[0] * min(expert_NK.shape[1], own)
    journey = transport(deal(x_ND, sorting.order, sorting.inverse), sorting.expert, count_X, places, own)
    arrived = Sorting(journey.expert_R, own)
    x_RD = pick(journey.x_RD, arrived.order, arrived.inverse)
    y_RD = run_experts(x_RD, arrived, weights, activation, method)
    y_MD = journey.back(pick(y_RD, arrived.inverse, arrived.order))
    return combine(pick(y_MD, sorting.inverse, sorting.order), weight_NK)


def _padded(x_MD: jax.Array, expert_M: jax.Array, count_X: jax.Array, places: int, own: int) -> _Journey:
    """`places` rows between each pair of devices, filled up with rows of no expert."""
    M, X = x_MD.shape[0], count_X.shape[0]
    start_X = jnp.cumsum(count_X, dtype=jnp.int32) - count_X
    place_P = jnp.arange(places, dtype=jnp.int32)
    row_XP = jnp.where(place_P[None, :] < count_X[:, None], start_X[:, None] + place_P[None, :], M)
    device_M = expert_M // own
    slot_M = device_M * places + jnp.arange(M, dtype=jnp.int32) - jnp.take(start_X, device_M, mode="clip")
    slot_M = jnp.where(device_M < X, slot_M, X * places)

    def across(y: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(y, "expert", 0, 0, tiled=True)

    sent = pick(x_MD, row_XP.reshape(-1), slot_M)
    none = jnp.int32(own)
    local_XP = jnp.where(row_XP < M, jnp.take(expert_M, row_XP, mode="clip") % own, none)
    return _Journey(
        across(sent), across(local_XP.reshape(-1)), lambda y_RD: pick(across(y_RD), slot_M, row_XP.reshape(-1))
    )


def _ragged(x_MD: jax.Array, expert_M: jax.Array, count_X: jax.Array, places: int, own: int) -> _Journey:
    """Only the rows that there are, one device's behind the other's."""
    M, X = x_MD.shape[0], count_X.shape[0]
    me = jax.lax.axis_index("expert")
    count_SX = jax.lax.all_gather(count_X, "expert")  # of device S for device X
    to, of = count_SX[me], count_SX[:, me]
    # Where, on each receiver, my rows begin: there, and on the way back.
    behind_SX = jnp.cumsum(count_SX, axis=0, dtype=jnp.int32) - count_SX
    within_SX = jnp.cumsum(count_SX, axis=1, dtype=jnp.int32) - count_SX

    def there(y: jax.Array, into: jax.Array) -> jax.Array:
        return jax.lax.ragged_all_to_all(y, into, within_SX[me], to, behind_SX[me], of, axis_name="expert")

    def back(y_RD: jax.Array) -> jax.Array:
        into = jnp.zeros((M, y_RD.shape[1]), y_RD.dtype)
        return jax.lax.ragged_all_to_all(y_RD, into, behind_SX[:, me], of, within_SX[:, me], to, axis_name="expert")

    room = X * places
    received = there(x_MD, jnp.zeros((room, x_MD.shape[1]), x_MD.dtype))
    return _Journey(received, there(expert_M % own, jnp.full(room, own, jnp.int32)), back)


_TRANSPORTS: Mapping[Transport, Callable[..., _Journey]] = {"padded": _padded, "ragged": _ragged}
