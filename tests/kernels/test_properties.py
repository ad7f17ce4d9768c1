"""What must hold of any two policies (hypothesis)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ppojax.kernels import token_stats

V = 9
LOGITS = arrays(np.float32, (4, V), elements=st.floats(-30, 30, width=32))


@jax.jit
def between(z: jax.Array, y: jax.Array):
    """Statistics of policies with these logits."""
    head = jnp.eye(V)
    ids = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None, :], (4, 3))
    target = jnp.zeros(4, jnp.int32)
    everything = {"entropy": True, "kl": True, "reverse_kl": True, "tv": True}
    return token_stats(z, head, target, reference=(y, head), topk_id_NK=ids, **everything)


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS)
def test_bounds_and_symmetry(z, y):
    """0 <= TV <= 1, KL >= 0, Pinsker's TV <= sqrt(KL / 2), TV symmetric, KL(q||p) is KL(p||q) the other way round."""
    there, back = between(z, y), between(y, z)
    tv, kl = np.asarray(there.tv), np.asarray(there.kl)
    assert (tv >= 0).all() and (tv <= 1 + 1e-6).all() and (kl >= 0).all()
    assert (tv <= np.sqrt(kl / 2) + 1e-3).all()
    np.testing.assert_allclose(there.tv, back.tv, atol=1e-6)
    np.testing.assert_allclose(there.kl, back.reverse_kl, rtol=1e-5, atol=1e-6)
    assert (np.asarray(there.entropy) >= -1e-6).all() and (np.asarray(there.entropy) <= np.log(V) + 1e-5).all()


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS)
def test_a_coarser_look_sees_less(z, y):
    """TV of {target, rest} <= TV of {top K, rest} <= TV of all words."""
    there, back = between(z, y), between(y, z)
    p, q = np.exp(np.asarray(there.topk_logp)), np.exp(np.asarray(back.topk_logp))
    binary = np.abs(p[:, 0] - q[:, 0])
    topk = 0.5 * (np.abs(p - q).sum(1) + np.abs(p.sum(1) - q.sum(1)))
    assert (binary <= topk + 1e-6).all()
    assert (topk <= np.asarray(there.tv) + 1e-6).all()
