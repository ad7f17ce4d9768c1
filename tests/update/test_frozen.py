"""A critic whose attention stands still."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from families import CASES, opened
from ppojax.models import parameters
from ppojax.update.settings import CriticConfig, OptimizerConfig, is_attention

OTHERS = {"mlp_norm", "post_mlp_norm", "gate", "up", "down", "gate_bias", "up_bias", "down_bias"}


@pytest.mark.parametrize("name", CASES)
def test_what_attention_is(name: str) -> None:
    """All of a block but its MLP, its experts and their norms."""
    spec = opened(name).spec
    for experts in {False, spec.moe is not None}:
        for leaf in parameters.block(spec, experts):
            mlp = leaf in OTHERS or leaf.startswith(("expert_", "router", "choice_bias", "shared_"))
            assert is_attention(leaf) != mlp, leaf


def test_only_the_rest_moves_and_is_measured() -> None:
    """The clip sees the norm of what is trained, and weights that stand still do not decay."""
    config = CriticConfig(
        freeze="attention", optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1.0)
    )
    trained = {"trunk": {"layers": {"up": jnp.ones(4)}}, "value_head": jnp.ones(2)}
    whole = {"trunk": {"layers": {"up": jnp.ones(4), "q": jnp.ones(3)}}, "value_head": jnp.ones(2)}

    def step(config: CriticConfig, params: dict) -> dict:
        optimizer = config.build_optimizer()
        grads = jax.tree.map(lambda p: 100.0 * p, params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    got = step(config, whole)
    np.testing.assert_array_equal(got["trunk"]["layers"].pop("q"), 1.0)
    want = step(config.model_copy(update={"freeze": "none"}), trained)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
