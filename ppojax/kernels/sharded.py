"""Token statistics with the vocabulary split over the mesh's `tensor` axis and the rows over its other axes.

Each device holds its rows' logits for its words only. Maxima, sums and expectations are combined by collectives of a
few numbers a row; the hidden states' gradient is summed over the vocabulary's parts, the head's over the rows'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ppojax.kernels import tiled
from ppojax.kernels.rows import Residuals, Split
from ppojax.kernels.sweeps import XLA, Ask, Normal, Sweeps
from ppojax.kernels.tiled import Inputs, Plan, Saved
from ppojax.mesh import RULES, row_shards
from ppojax.types import TokenStats

(VOCABULARY,) = RULES["vocab"]
ROWS = RULES["rows"]


def token_stats(
    inputs: Inputs,
    *,
    temperature: float,
    softcap: float | None,
    ask: Ask,
    mesh: jax.sharding.Mesh,
    sweeps: Sweeps = XLA,
    rows_per_tile: int | None = None,
) -> TokenStats:
    """Compute `ppojax.kernels.token_stats` on a mesh; its `tensor` axis must divide the vocabulary."""
    shards = row_shards(mesh)
    rows = inputs.hidden_ND.shape[0]
    padded = _map_rows(lambda x: jnp.pad(x, [(0, -rows % shards)] + [(0, 0)] * (x.ndim - 1)), inputs)
    local = _map_rows(lambda x: jax.ShapeDtypeStruct((x.shape[0] // shards, *x.shape[1:]), x.dtype), padded)
    words = inputs.head_VD.shape[0] // mesh.shape[VOCABULARY]
    local = local._replace(head_VD=jax.ShapeDtypeStruct((words, *inputs.head_VD.shape[1:]), inputs.head_VD.dtype))
    plan = tiled.plan(local, temperature, softcap, ask, sweeps, rows_per_tile, Split(VOCABULARY))
    return jax.tree.map(lambda x: x[:rows], _token_stats(plan, mesh, padded))


def _map_rows(f: Any, inputs: Inputs) -> Inputs:
    """Apply to what has rows: all but the heads."""
    names = ("hidden_ND", "target_N", "reference_hidden_ND", "id_NK")
    values = inputs._asdict()
    return inputs._replace(**{name: None if values[name] is None else f(values[name]) for name in names})


def _input_specs(inputs: Inputs) -> Inputs:
    specs = _map_rows(lambda x: PartitionSpec(ROWS), inputs)
    reference = None if inputs.reference_head_VD is None else PartitionSpec(VOCABULARY)
    return specs._replace(head_VD=PartitionSpec(VOCABULARY), reference_head_VD=reference)


def _output_specs(plan: Plan, inputs: Inputs) -> tuple[Any, Saved]:
    """Every number of a row is on all devices that have the row; kept logits lie as they were made."""
    row: Any = PartitionSpec(ROWS)
    ask = plan.ask
    asked = (ask.entropy, ask.kl, ask.reverse_kl, ask.tv, inputs.id_NK is not None)
    stats = TokenStats(row, *(row if x else None for x in asked))
    normal, needed = Normal(row, row), (ask.entropy, ask.kl, ask.tv)
    residuals = Residuals(normal, normal if ask.reference else None, *(row if x else None for x in needed))
    kept = PartitionSpec(ROWS, VOCABULARY) if plan.tiles == 1 else None
    return stats, Saved(residuals, kept, kept if ask.reference else None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_stats(plan: Plan, mesh: jax.sharding.Mesh, inputs: Inputs) -> TokenStats:
    return _forward(plan, mesh, inputs)[0]


def _forward(plan: Plan, mesh: jax.sharding.Mesh, inputs: Inputs) -> tuple[TokenStats, tuple[Inputs, Saved]]:
    specs = _input_specs(inputs)
    run = jax.shard_map(
        partial(tiled.forward, plan),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=_output_specs(plan, inputs),
        check_vma=False,
    )
    stats, saved = run(inputs)
    return stats, (inputs, saved)


def _backward(plan: Plan, mesh: jax.sharding.Mesh, residuals: tuple[Inputs, Saved], cotangent: Any) -> tuple[Inputs]:
    inputs, saved = residuals
    stats_specs, saved_specs = _output_specs(plan, inputs)

    def local(inputs: Inputs, saved: Saved, cotangent: TokenStats) -> tuple[jax.Array, jax.Array]:
        d_hidden_ND, d_head_VD = tiled.backward(plan, inputs, saved, cotangent)
        return jax.lax.psum(d_hidden_ND, VOCABULARY), jax.lax.psum(d_head_VD, ROWS)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_input_specs(inputs), saved_specs, stats_specs),
        out_specs=(PartitionSpec(ROWS), PartitionSpec(VOCABULARY)),
        check_vma=False,
    )
    return (tiled.only(inputs, *run(inputs, saved, cotangent)),)


_token_stats.defvjp(_forward, _backward)
