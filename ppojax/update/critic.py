"""The critics' step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ppojax.masking import finish
from ppojax.models.forward import ModelDef, Params, values
from ppojax.types import Batch, Layout, LossOut, Mean, TrainState
from ppojax.update.accumulate import gradients
from ppojax.update.settings import CriticConfig
from ppojax.update.state import apply_gradients, state_shardings


@partial(jax.jit, static_argnames=("model", "config", "layout", "microbatch_rows", "mesh"), donate_argnames=("state",))
def critic_step(
    state: TrainState,
    batch: Batch,
    *,
    model: ModelDef,
    config: CriticConfig,
    layout: Layout,
    microbatch_rows: int,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step of the value regression on a minibatch."""

    def objective(params: Params, rows: Batch) -> LossOut:
        return config.loss(values(model, params, rows.experience, layout), rows)

    grads, value, weight, metrics = gradients(objective, state.params, batch, microbatch_rows, layout.group)
    transform = config.build_optimizer()
    rate = config.optimizer.learning_rate_at(state.step)
    state, applied = apply_gradients(state, grads, weight, transform, state_shardings(model, transform, mesh))
    one = jnp.float32(1)
    metrics |= {"critic/loss": Mean(value, one), "critic/lr": Mean(rate, one)}
    return state, finish(metrics | {f"critic/{name}": m for name, m in applied.items()})
