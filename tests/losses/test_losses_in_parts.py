"""Every loss and its gradient are the same, however the rows of a minibatch are cut up or laid over devices.

Without a model, which treats rows alone: what a loss says of a row depends on others by counts of the minibatch only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_losses import LOSSES, MORE
from ppojax.masking import finish
from ppojax.mesh import MeshConfig, shard_rows
from ppojax.types import Batch, LossOut, Recorded, TokenStats
from ppojax.update.accumulate import gradients
from small_batch import experience_of

B, T, K = 8, 9, 3
EVERY = LOSSES | MORE
WAYS = {"microbatches of 1": (1, 1), "microbatches of 2": (2, 1), "8 devices": (8, 8), "by 4 on 4": (4, 4)}


def inputs() -> tuple[Batch, TokenStats]:
    """Rows of 0 to T actions, two of one episode, with all that a loss may read."""
    rng = np.random.default_rng(0)
    action = rng.random((B, T)) < 0.7
    action[0], action[1] = False, [True] + [False] * (T - 1)
    action[:, -1] = False
    mu = rng.uniform(-3, -0.02, (B, T))
    old, now, ref = (np.minimum(mu + rng.normal(0, spread, (B, T)), -1e-3) for spread in (0.2, 0.7, 0.3))
    e = experience_of(action, behavior=mu, old=old, ref=ref)
    top = np.sort(rng.uniform(-4, -1.5, (2, B, T, K)))
    recorded = Recorded(jnp.asarray(rng.integers(1, 9, (B, T, K)), jnp.int32), jnp.asarray(top[0], jnp.float32))
    written = action.sum(1).astype(np.float32)
    written[2] = written[3] = written[2] + written[3]
    batch = Batch(
        e._replace(recorded=recorded),
        jnp.asarray(np.where(action, rng.normal(size=(B, T)), 0), jnp.float32),
        score_B=jnp.asarray([1, 0, 0.5, 0, 0, 2, 0, 0], jnp.float32),
        written_B=jnp.asarray(written),
    )
    entropy, reverse_kl, tv = (jnp.asarray(rng.random((B, T)), jnp.float32) for _ in range(3))
    stats = TokenStats(jnp.asarray(now, jnp.float32), entropy, None, reverse_kl, tv, jnp.asarray(top[1], jnp.float32))
    return batch, stats


def run(microbatch_rows: int, devices: int, metrics: bool) -> dict[str, Any]:
    """Each loss, its slopes in log pi and its metrics (half of the compiler's time), as an update makes them."""
    mesh = MeshConfig(data=devices).build()
    batch, stats = shard_rows(inputs(), mesh)

    def of(loss: Any, batch: Batch, stats: TokenStats) -> Any:
        def objective(params: dict[str, Any], rows: Batch) -> LossOut:
            own = {name: x[rows.experience.episode_B] for name, x in params.items() if x is not None}
            return loss(TokenStats(**own), rows)

        slopes, value, _, told, _ = gradients(objective, stats._asdict(), loss.of_minibatch(batch), microbatch_rows)
        return value, slopes["logp"], finish(told) if metrics else {}

    program = jax.jit(lambda batch, stats: {name: of(loss, batch, stats) for name, loss in EVERY.items()})
    return jax.device_get(program(batch, stats))


@lru_cache
def whole(metrics: bool) -> dict[str, Any]:
    return run(B, 1, metrics)


@pytest.mark.slow
def test_the_rows_are_worth_cutting() -> None:
    """Those with a region leave some of the tokens out, and corrections weigh some otherwise."""
    for name, (_, _, told) in whole(True).items():
        if name.startswith(("dppo", "minirl", "dis", "ipo", "drpo", "cppo")):
            assert 0 < told["trust_region/masked_frac"] < 1, name
        if "correction/outside_frac" in told and name != "decoupled":
            assert 0 < told["correction/outside_frac"] < 1, name


@pytest.mark.parametrize(
    ("way", "metrics"), [("by 4 on 4", False), *(pytest.param(way, True, marks=pytest.mark.slow) for way in WAYS)]
)
def test_parts_change_nothing(way: str, metrics: bool) -> None:
    got = run(*WAYS[way], metrics)
    for name, want in whole(metrics).items():
        assert np.abs(want[1]).max() > 1e-3, name
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, 2e-5, 1e-6, err_msg=name), got[name], want
        )
