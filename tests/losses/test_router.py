"""The router's losses and the metrics of load, by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.losses.router import RouterLoss
from ppojax.masking import finish
from ppojax.types import Routing

# Two layers, 4 experts, 2 of them for each of 6 tokens: the first in balance, the second with two experts that get all.
LOAD = [[3, 3, 3, 3], [6, 6, 0, 0]]
PROBABILITY = [[1.5, 1.5, 1.5, 1.5], [4.0, 1.0, 0.5, 0.5]]


def routing_of(**changes: Any) -> Routing:
    values: dict[str, Any] = {
        "expert_NK": jnp.zeros((2, 1, 6, 2), jnp.int32),
        "load_E": jnp.array(LOAD, jnp.float32),
        "probability_E": jnp.array(PROBABILITY, jnp.float32),
        "z": jnp.array([6.0, 12.0]),
        "agreed": jnp.array([12.0, 9.0]),
        "tokens": jnp.array([6.0, 6.0]),
    }
    return Routing(**(values | changes))


def test_both_losses_by_hand() -> None:
    # 4 sum f P: in balance 4 * 4 * (1/2 * 1/4) = 2 = K; else 4 * (4/6 + 1/6) = 10/3. z: means 1 and 2.
    total, metrics = RouterLoss(balance=0.3, z=0.1)(routing_of())
    assert float(total) == pytest.approx(0.3 * (2 + 10 / 3) / 2 + 0.1 * 1.5)
    got = {name: float(x) for name, x in finish(metrics).items()}
    assert got == pytest.approx(
        {
            "moe/balance_loss": (2 + 10 / 3) / 2,
            "moe/z_loss": 1.5,
            "moe/load_max": (1 + 2) / 2,
            "moe/load_entropy": (1 + np.log(2) / np.log(4)) / 2,
            "moe/dead_frac": 0.25,
            "moe/free_choice_frac": 21 / 24,
        }
    )


def test_the_gradient_is_that_of_the_probabilities() -> None:
    """d balance / d P_e = E f_e, over layers and tokens; the counts get none, and lowering it evens the load out."""

    def loss(probability: jax.Array, load: jax.Array) -> jax.Array:
        return RouterLoss(balance=1.0)(routing_of(probability_E=probability, load_E=load))[0]

    p, load = jnp.array(PROBABILITY, jnp.float32), jnp.array(LOAD, jnp.float32)
    dp, dload = jax.grad(loss, (0, 1))(p, load)
    np.testing.assert_allclose(dp, 4 * load / 6 / 6 / 2, rtol=1e-6)
    assert not np.asarray(dload).any()


def test_it_is_off_by_default_and_survives_no_tokens() -> None:
    total, metrics = RouterLoss()(routing_of())
    assert float(total) == 0 and float(finish(metrics)["moe/z_loss"]) == 1.5
    nothing = jax.tree.map(jnp.zeros_like, routing_of())
    total, metrics = RouterLoss(balance=1.0, z=1.0)(nothing)
    assert float(total) == 0 and np.isfinite([float(x) for x in finish(metrics).values()]).all()
