"""The critics' step."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppojax.masking import finish
from ppojax.models.forward import ModelDef, Params, predict
from ppojax.models.lora import combine
from ppojax.models.value_head import ArctanHead, HLGaussHead
from ppojax.types import Batch, Layout, LossOut, Mean, TrainState
from ppojax.update.accumulate import gradients
from ppojax.update.settings import CriticConfig, Split
from ppojax.update.state import apply_gradients, loss_scale, state_shardings


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
    frozen: Params | None = None,
    key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step of the value regression on a minibatch.

    Critics of an ensemble are so many lone critics: each has its own rows, gradient, clipping and optimizer state, and
    may be refused alone. They take their steps one after another, in the memory of one. Metrics are means over them.
    `frozen` are the weights beside adapters, the same for all. With a `key` adapters drop inputs, each critic's its own
    (`model.lora.dropout`).
    """
    transform = config.build_optimizer()
    one = partial(
        _step,
        model=model.member,
        config=config,
        layout=layout,
        microbatch_rows=microbatch_rows,
        frozen={} if frozen is None else frozen,
    )
    if model.count == 1:
        state, metrics = one(state, batch, key)
    else:
        key_M = None if key is None else jax.random.split(key, model.count)
        own_M = _deal(batch, model.count, config.split)
        state, metrics = jax.lax.map(lambda x: one(x[0], _dealt(batch, x[1]), x[2]), (state, own_M, key_M))
        metrics = {name: jnp.mean(value) for name, value in metrics.items()}
    shardings = state_shardings(model, transform, mesh, spread=config.optimizer.over_data)
    return jax.lax.with_sharding_constraint(state, shardings), metrics


def _step(
    state: TrainState,
    batch: Batch,
    key: jax.Array | None,
    *,
    model: ModelDef,
    config: CriticConfig,
    layout: Layout,
    microbatch_rows: int,
    frozen: Params,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The step of one critic."""

    def objective(params: Params, rows: Batch) -> LossOut:
        got = predict(model, combine(frozen, params), rows.experience, layout, key)
        if isinstance(model.head, HLGaussHead) or (isinstance(model.head, ArctanHead) and config.loss.cross_entropy):
            assert rows.return_MBT is not None, "no critic targets: the advantage estimator returned none"
            return config.loss(got.value_MBT, rows, model.head.cross_entropy(got.output_MBTK, rows.return_MBT))
        return config.loss(got.value_MBT, rows)

    scale = loss_scale(state, model.dtype)
    grads, value, weight, metrics, _ = gradients(objective, state.params, batch, microbatch_rows, layout.group, scale)
    rate = config.optimizer.learning_rate_at(state.step)
    state, applied = apply_gradients(state, grads, weight, config.build_optimizer())
    one = jnp.float32(1)
    metrics |= {"critic/loss": Mean(value, one), "critic/lr": Mean(rate, one)}
    metrics |= {} if scale is None else {"critic/loss_scale": Mean(scale, one)}
    return state, finish(metrics | {f"critic/{name}": m for name, m in applied.items()})


class _Own(NamedTuple):
    """What of a batch is a critic's own, on a leading axis over critics."""

    action_BT: jax.Array
    value_MBT: jax.Array | None
    return_MBT: jax.Array | None


def _deal(batch: Batch, count: int, split: Split) -> _Own:
    """Give every critic of an ensemble its values, its targets and its actions.

    `prompts`: critic m learns from the groups g with g % M = m; `responses`: from the episodes e with e % M = m, which
    are every M-th of each group (AsyPPO, arXiv 2510.01656, splits each prompt's responses without overlap).
    """
    e = batch.experience
    owner_B = {"none": None, "prompts": e.group_B, "responses": e.episode_B}[split]
    action_MBT = jnp.broadcast_to(e.action_BT, (count, *e.action_BT.shape))
    if owner_B is not None:
        mine_MB = owner_B[None, :] % count == jnp.arange(count, dtype=jnp.int32)[:, None]
        action_MBT = action_MBT & mine_MB[:, :, None]
    value_MBT = None if e.value_MBT is None else e.value_MBT[:, None]
    return _Own(action_MBT, value_MBT, None if batch.return_MBT is None else batch.return_MBT[:, None])


def _dealt(batch: Batch, own: _Own) -> Batch:
    """The batch of one critic."""
    experience = batch.experience._replace(action_BT=own.action_BT, value_MBT=own.value_MBT)
    return batch._replace(experience=experience, return_MBT=own.return_MBT)
