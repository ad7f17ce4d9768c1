"""Losses on the router of a mixture of experts, and how evenly it loads them."""

from __future__ import annotations

import math

from pydantic import Field

from ppojax.component import Component
from ppojax.lazy import jax, jnp
from ppojax.types import Mean, Metrics, Routing


class RouterLoss(Component):
    """Balance and z-loss of the routers, added to the policy's loss. Off by default.

    A checkpoint brings balanced routers along, the steps of reinforcement learning are small, and the gradient of
    balance is not one of reward: it moves the policy where nothing was learned. Watch `moe/load_max` and
    `moe/dead_frac`, and turn them on when these drift.
    """

    balance: float = Field(default=0.0, ge=0, description="weight of the load-balancing loss; pretraining uses 1e-3")
    z: float = Field(default=0.0, ge=0, description="weight of the z-loss of router logits; pretraining uses 1e-3")

    def __call__(self, routing: Routing) -> tuple[jax.Array, Metrics]:
        """The weighted sum of both losses, each a mean over the layers, and the metrics of load.

        balance  E sum_e f_e P_e, with f_e the tokens sent to e over all tokens and P_e the mean probability: K when
                 loads are equal (arXiv 2101.03961, eq. 4, over K choices); no gradient through f
        z        mean over tokens of (log sum exp of the logits)^2 (arXiv 2202.08906, eq. 5)

        Both are of the microbatch at hand, over all devices: unlike a policy loss they depend on how a minibatch is
        cut. Padding does not count, but prompts and observations do.
        """
        (L, E), K = routing.load_E.shape, routing.expert_NK.shape[-1]
        tokens_L1 = jnp.maximum(routing.tokens, 1.0).reshape(L, 1)
        f_LE = jax.lax.stop_gradient(routing.load_E) / tokens_L1
        balance = E * jnp.mean(jnp.sum(f_LE * routing.probability_E / tokens_L1, axis=-1))
        z = jnp.mean(routing.z / tokens_L1[:, 0])
        weight = routing.tokens[0]
        share_LE = f_LE / K
        entropy_L = -jnp.sum(share_LE * jnp.log(jnp.maximum(share_LE, 1e-20)), axis=-1) / max(math.log(E), 1e-9)

        def mean(x: jax.Array) -> Mean:
            return Mean(jnp.mean(x) * weight, weight)

        metrics: Metrics = {
            "moe/balance_loss": mean(balance),
            "moe/z_loss": mean(z),
            "moe/load_max": mean(E * jnp.max(share_LE, axis=-1)),
            "moe/load_entropy": mean(entropy_L),
            "moe/dead_frac": mean((f_LE == 0).astype(jnp.float32)),
            "moe/free_choice_frac": mean(routing.agreed / tokens_L1[:, 0] / K),
        }
        return self.balance * balance + self.z * z, jax.lax.stop_gradient(metrics)
