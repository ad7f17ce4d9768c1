"""Gradients of a minibatch, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppojax.experience.minibatch import join_rows, split_rows
from ppojax.masking import reduce_parts
from ppojax.models.forward import Params
from ppojax.types import Batch, LossOut, Metrics, TokenTrace


def gradients(
    loss: Callable[[Params, Batch], LossOut],
    params: Params,
    batch: Batch,
    microbatch_rows: int,
    group: int = 1,
    scale: jax.Array | None = None,
) -> tuple[Params, jax.Array, jax.Array, Metrics, TokenTrace | None]:
    """Differentiate sum / weight over the whole minibatch.

    Sums and weights of the parts are added up before the one division, so neither the loss nor its gradient depends
    on how the rows are cut into microbatches (`group` consecutive rows stay together). Gradients accumulate in float32.
    They are taken of the sum times `scale`, and divided by it, so that what float16 holds of them does not underflow.

    Returns:
        Gradients, the loss, its weight, the metrics of the whole minibatch, and its trace, if the loss has one.
    """

    def part(params: Params, rows: Batch) -> tuple[jax.Array, LossOut]:
        out = loss(params, rows)
        return out.sum if scale is None else out.sum * scale, out

    def one(rows: Batch) -> tuple[Params, jax.Array, jax.Array, Metrics, TokenTrace | None]:
        (_, out), grads = jax.value_and_grad(part, has_aux=True)(params, rows)
        return grads, out.sum, out.weight, out.metrics, out.trace

    def step(carry: tuple, rows: Batch) -> tuple[tuple, tuple[Metrics, TokenTrace | None]]:
        *sums, metrics, trace = one(rows)
        return jax.tree.map(jnp.add, carry, tuple(sums)), (metrics, trace)

    parts = split_rows(batch, microbatch_rows, group)
    if parts.advantage_BT.shape[0] == 1:  # nothing to add up: spare the passes over the parameters
        grads, total, weight, metrics, trace = one(jax.tree.map(lambda x: x[0], parts))
    else:
        zeros = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.float32(0))
        (grads, total, weight), (stacked, traces) = jax.lax.scan(step, zeros, parts)
        metrics = reduce_parts(stacked)
        trace = jax.tree.map(lambda x: join_rows(x, group), traces)
    share = jnp.where(weight > 0, 1.0 / jnp.maximum(weight, 1e-9), 0.0)
    unscaled = share if scale is None else share / scale
    return jax.tree.map(lambda g: g * unscaled, grads), total * share, weight, metrics, trace
