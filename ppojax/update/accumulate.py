"""Gradients of a minibatch, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppojax.experience.minibatch import split_rows
from ppojax.masking import reduce_parts
from ppojax.models.forward import Params
from ppojax.types import Batch, LossOut, Metrics


def gradients(
    loss: Callable[[Params, Batch], LossOut], params: Params, batch: Batch, microbatch_rows: int, group: int = 1
) -> tuple[Params, jax.Array, Metrics]:
    """Differentiate sum / weight over the whole minibatch.

    Sums and weights of the parts are added up before the one division, so neither the loss nor its gradient depends
    on how the rows are cut into microbatches (`group` consecutive rows stay together). Gradients accumulate in float32.

    Returns:
        Gradients, the loss, and the metrics of the whole minibatch.
    """

    def part(params: Params, rows: Batch) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        out = loss(params, rows)
        return out.sum, (out.weight, out.metrics)

    def step(carry: tuple, rows: Batch) -> tuple[tuple, Metrics]:
        grads, total, weight = carry
        (sum_, (weight_, metrics)), grads_ = jax.value_and_grad(part, has_aux=True)(params, rows)
        grads = jax.tree.map(jnp.add, grads, grads_)
        return (grads, total + sum_, weight + weight_), metrics

    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.float32(0))
    (grads, total, weight), metrics = jax.lax.scan(step, zeros, split_rows(batch, microbatch_rows, group))
    scale = jnp.where(weight > 0, 1.0 / jnp.maximum(weight, 1e-9), 0.0)
    return jax.tree.map(lambda g: g * scale, grads), total * scale, reduce_parts(metrics)
