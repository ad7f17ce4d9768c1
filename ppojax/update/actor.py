"""The actor's step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ppojax.losses import Loss
from ppojax.losses.router import RouterLoss
from ppojax.masking import finish, masked_max, masked_mean
from ppojax.models.forward import ALONE, Heads, ModelDef, Params, score_and_route
from ppojax.models.lora import combine
from ppojax.types import Batch, Layout, LossOut, Mean, Metrics, TokenStats, TrainState
from ppojax.update.accumulate import gradients
from ppojax.update.settings import OptimizerConfig
from ppojax.update.state import apply_gradients, state_shardings

NO_ROUTER_LOSS = RouterLoss()


def mismatch(stats: TokenStats, batch: Batch) -> Metrics:
    """How far the trainer's log-probabilities are from the sampler's: before the first update, numerics alone.

    Over the whole vocabulary, TV and KL(sampler || trainer), where the sampler's hidden states are recorded.
    """
    e = batch.experience
    gap_BT = jax.lax.stop_gradient(stats.logp) - e.logp_behavior_BT
    exact: Metrics = {}
    if stats.tv is not None and stats.reverse_kl is not None:
        exact["sampling/tv_mean"] = masked_mean(stats.tv, e.action_BT)
        exact["sampling/tv_max"] = masked_max(stats.tv, e.action_BT)
        exact["sampling/kl_mean"] = masked_mean(stats.reverse_kl, e.action_BT)
    return exact | {
        "sampling/logp_diff_mean": masked_mean(jnp.abs(gap_BT), e.action_BT),
        "sampling/logp_diff_max": masked_max(jnp.abs(gap_BT), e.action_BT),
        "sampling/ratio_mean": masked_mean(jnp.exp(jnp.clip(gap_BT, -20.0, 20.0)), e.action_BT),
    }


@partial(
    jax.jit,
    static_argnames=("model", "loss", "optimizer", "temperature", "layout", "microbatch_rows", "mesh", "router"),
    donate_argnames=("state",),
)
def actor_step(
    state: TrainState,
    batch: Batch,
    *,
    model: ModelDef,
    loss: Loss,
    optimizer: OptimizerConfig,
    temperature: float,
    layout: Layout,
    microbatch_rows: int,
    mesh: jax.sharding.Mesh,
    router: RouterLoss = NO_ROUTER_LOSS,
    frozen: Params | None = None,
    key: jax.Array | None = None,
    heads: Heads = ALONE,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step on a minibatch: one gradient of `loss`, clipped, applied to the float32 masters.

    `router` adds its losses where the model has experts. `frozen` are the weights beside adapters; there are none where
    everything is trained. With a `key` the adapters drop inputs (`model.lora.dropout`), also in the ratios and the
    `sampling/` metrics, which are then of the policy that drops.

    `heads` are of the policies that the loss compares with over the whole vocabulary.
    """

    def objective(params: Params, rows: Batch) -> LossOut:
        whole = combine(frozen or {}, params)
        stats, routing = score_and_route(
            model, whole, rows.experience, layout, temperature=temperature, entropy=True, key=key, heads=heads
        )
        out = loss(stats, rows)
        metrics = {**out.metrics, **mismatch(stats, rows)}
        if routing is None:
            return out._replace(metrics=metrics)
        extra, load = router(routing)
        return LossOut(out.sum + extra * out.weight, out.weight, {**metrics, **load})

    grads, value, weight, metrics = gradients(objective, state.params, batch, microbatch_rows, layout.group)
    transform = optimizer.build()
    rate = optimizer.learning_rate_at(state.step)
    state, applied = apply_gradients(state, grads, weight, transform)
    state = jax.lax.with_sharding_constraint(state, state_shardings(model, transform, mesh))
    one = jnp.float32(1)
    metrics |= {"actor/loss": Mean(value, one), "actor/lr": Mean(rate, one)}
    return state, finish(metrics | {f"actor/{name}": m for name, m in applied.items()})
