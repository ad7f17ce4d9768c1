"""The supervised loss, and the settings that name a policy loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import TypeAdapter

from ppojax.losses import DPPO, NLL, Loss, PPOClip
from ppojax.types import Batch, TokenStats
from small_batch import experience_of


def test_by_hand():
    b = Batch(experience_of([[1, 0, 1], [0, 0, 0]]), jnp.full((2, 3), -7.0))
    logp = jnp.asarray([[-1.0, -50.0, -0.5], [-2.0, -2.0, -2.0]])
    out = NLL()(TokenStats(logp), b)
    assert (float(out.sum), float(out.weight)) == (1.5, 2)
    np.testing.assert_array_equal(out.metrics["actor/nll_loss"], (1.5, 2))
    grad = jax.grad(lambda logp: NLL()(TokenStats(logp), b).sum)(logp)
    np.testing.assert_array_equal(grad, [[-1, 0, -1], [0, 0, 0]])
    assert NLL().needs == frozenset()
    assert not NLL().entropy


def test_type_names_the_loss():
    read = TypeAdapter(Loss).validate_python
    assert read({"type": "dppo", "delta_low": 0.1}) == DPPO(delta_low=0.1)
    assert read({"type": "ppo"}) == PPOClip()
    assert read({"type": "nll"}) == NLL()
    assert hash(read({"type": "dppo"})) == hash(DPPO())
