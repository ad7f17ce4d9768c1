"""The actor's step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ppojax.losses import Loss
from ppojax.losses.divergence import held, log_ratio
from ppojax.losses.router import RouterLoss
from ppojax.masking import finish, masked_max, masked_mean
from ppojax.models.forward import ALONE, Heads, ModelDef, Params, score_and_route
from ppojax.models.lora import combine
from ppojax.models.perturb import NAME, Perturb, apart, perturbation_of
from ppojax.types import Batch, Layout, LossOut, Max, Mean, Metrics, TokenStats, TokenTrace, TrainState
from ppojax.update.accumulate import gradients
from ppojax.update.settings import OptimizerConfig, with_perturb
from ppojax.update.state import apply_gradients, loss_scale, state_shardings

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
        "sampling/ratio_mean": masked_mean(jnp.exp(held(gap_BT)), e.action_BT),
    }


def trace_tokens(loss: Loss, stats: TokenStats, batch: Batch) -> TokenTrace:
    """Record the ratio of each action token, and whether its log-probability has a gradient of its own.

        ratio_t = pi(y_t)/mu(y_t),      mask_t = d loss / d log pi(y_t) != 0

    Everything else in the loss is held fixed, so that an entropy bonus, which every token has, does not count.
    """
    stats, action_BT = jax.lax.stop_gradient(stats), batch.experience.action_BT
    slope_BT = jax.grad(lambda logp_BT: loss(stats._replace(logp=logp_BT), batch).sum)(stats.logp)
    ratio_BT = jnp.exp(log_ratio(stats.logp, batch.experience.logp_behavior_BT))
    return TokenTrace(jnp.where(action_BT, ratio_BT, 0.0), action_BT & (slope_BT != 0))


@partial(
    jax.jit,
    static_argnames=(
        *("model", "loss", "optimizer", "temperature", "layout", "microbatch_rows", "mesh", "router", "perturb"),
    ),
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
    perturb: Perturb | None = None,
    noise_key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array], TokenTrace]:
    """Take one optimizer step on a minibatch: one gradient of `loss`, clipped, applied to the float32 masters.

    `router` adds its losses where the model has experts. `frozen` are the weights beside adapters; there are none where
    everything is trained. With a `key` the adapters drop inputs (`model.lora.dropout`), also in the ratios and the
    `sampling/` metrics, which are then of the policy that drops.

    `heads` are of the policies that the loss compares with over the whole vocabulary. Third comes `trace_tokens`.

    With `perturb` the policy is the one whose blocks read what `noise_key` makes noisy (ALP, arXiv 2603.19470), in the
    ratios and the `sampling/` metrics too, and `log_sigma` is trained with it; what it is compared with has no noise.
    """

    def objective(params: Params, rows: Batch) -> LossOut:
        whole = combine(frozen or {}, apart(params)[0])
        stats, routing = score_and_route(
            *(model, whole, rows.experience, layout),
            temperature=temperature,
            entropy=True,
            key=key,
            heads=heads,
            perturbation=perturbation_of(perturb, params, noise_key),
        )
        out = loss(stats, rows)
        out = out._replace(metrics={**out.metrics, **mismatch(stats, rows)}, trace=trace_tokens(loss, stats, rows))
        if routing is None:
            return out
        extra, load = router(routing)
        return out._replace(sum=out.sum + extra * out.weight, metrics={**out.metrics, **load})

    batch, scale = loss.of_minibatch(batch), loss_scale(state, model.dtype)
    parts = (batch, microbatch_rows, layout.group, scale)
    grads, value, weight, metrics, trace = gradients(objective, state.params, *parts)
    transform, rate = with_perturb(optimizer, perturb), optimizer.learning_rate_at(state.step)
    assert trace is not None
    state, applied = apply_gradients(state, grads, weight, transform)
    state = jax.lax.with_sharding_constraint(
        state, state_shardings(model, transform, mesh, perturbed=perturb is not None, spread=optimizer.over_data)
    )
    metrics |= _told(value, rate, scale)
    if perturb is not None:
        metrics |= _sizes(perturb.sigma(state.params[NAME]))
    return state, finish(metrics | {f"actor/{name}": m for name, m in applied.items()}), trace


def _told(loss: jax.Array, rate: jax.Array, scale: jax.Array | None) -> Metrics:
    one = jnp.float32(1)
    scaled = {} if scale is None else {"actor/loss_scale": Mean(scale, one)}
    return {"actor/loss": Mean(loss, one), "actor/lr": Mean(rate, one), **scaled}


def _sizes(sigma: jax.Array) -> Metrics:
    """Deviations of the noise after the update, over the blocks that have it."""
    noisy, one = sigma > 0, jnp.float32(1)
    least = jnp.min(jnp.where(noisy, sigma, jnp.inf))
    return {
        "actor/sigma_mean": masked_mean(sigma, noisy),
        "actor/sigma_min": Mean(least, one),
        "actor/sigma_max": Max(jnp.max(sigma)),
    }
