"""What the disagreement of critics masks: by counting, with ties, and inside GAE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppojax.advantages import GAE
from ppojax.advantages.ensemble import EnsembleMask
from ppojax.experience.batch import make_batch
from small_batch import experience_of

B, T = 5, 9
SETTINGS = [EnsembleMask(agreed=0.2, disputed=0.35, scope=scope) for scope in ("row", "batch")]


@pytest.fixture(scope="module")
def program():
    return jax.jit(lambda value_MBT, action_BT: [mask(value_MBT, action_BT) for mask in SETTINGS])


def apart(sigma: np.ndarray) -> jax.Array:
    """Values of two critics whose deviation is sigma, exactly where sigma is a small whole number."""
    return jnp.asarray(np.stack([10 + sigma, 10 - sigma]), jnp.float32)


def by_counting(sigma: np.ndarray, share: float) -> np.ndarray:
    """A token is among the lowest when it and all that are no higher fit into the share."""
    room = int(share * len(sigma) + 1e-9)
    return np.array([(sigma <= x).sum() <= room for x in sigma], bool)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 4, 1000]))
def test_against_counting(program, seed, levels):
    """With many ties, with few, with none; rows without actions."""
    rng = np.random.default_rng(seed)
    sigma, action = rng.integers(0, levels, (B, T)).astype(float), rng.random((B, T)) < 0.7
    action[0] = False
    for mask, out in zip(SETTINGS, program(apart(sigma), jnp.asarray(action)), strict=True):
        for where in [action] if mask.scope == "batch" else [action & (np.arange(B) == b)[:, None] for b in range(B)]:
            np.testing.assert_array_equal(np.asarray(out.agreed_BT)[where], by_counting(sigma[where], 0.2))
            np.testing.assert_array_equal(~np.asarray(out.explored_BT)[where], by_counting(-sigma[where], 0.35))


@pytest.mark.parametrize("n", [5, 35, 1000])
def test_exactly_the_share_where_all_differ(n):
    """0.2 of 5 is 1 and 0.7 of 10 is 7, whatever float32 makes of 0.2 and 0.7."""
    sigma = np.random.default_rng(0).permutation(n)[None].astype(float)
    out = EnsembleMask(agreed=0.2, disputed=0.7, scope="row")(apart(sigma), jnp.ones((1, n), bool))
    assert out.agreed_BT.sum() == n // 5 and (~out.explored_BT).sum() == n * 7 // 10
    assert sigma[np.asarray(out.agreed_BT)].max() < n // 5


def critics(M: int, same: bool, seed: int = 0):
    rng = np.random.default_rng(seed)
    action = rng.random((B, T)) < 0.7
    action[:, -1] = False
    value = rng.normal(size=(1 if same else M, B, T)).repeat(M if same else 1, 0)
    return experience_of(action, reward=action * rng.normal(size=(B, T)), value=value)


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("scope", ["row", "batch"])
def test_identical_critics_are_one(M, scope):
    """Nothing is masked, to the bit: three equal values have a float32 mean that may be another."""
    mask = EnsembleMask(agreed=0.2, disputed=0.2, scope=scope)
    run = jax.jit(lambda one, many: (GAE()(one), GAE(ensemble=mask)(many)))
    one, many = run(critics(1, same=True), critics(M, same=True))
    # The mean of three equal values is off by a rounding, in advantages of order 1.
    np.testing.assert_allclose(many.advantage_BT, one.advantage_BT, atol=2e-6)
    np.testing.assert_array_equal(many.advantage_BT == 0, one.advantage_BT == 0)
    np.testing.assert_array_equal(many.return_MBT, one.return_MBT.repeat(M, 0))
    assert many.explored_BT is not None and many.explored_BT.all()


@pytest.mark.parametrize("whiten", ["off", "batch"])
def test_inside_gae(whiten):
    """Advantages are zeroed after whitening, nothing else changes, and the entropy bonus goes into the batch."""
    e = critics(3, same=False)
    masks = EnsembleMask(agreed=0.2, disputed=0.2)
    estimators = GAE(whiten=whiten), GAE(whiten=whiten, ensemble=masks)
    plain, masked, want = jax.jit(lambda e: (*(x(e) for x in estimators), masks(e.value_MBT, e.action_BT)))(e)
    np.testing.assert_array_equal(masked.advantage_BT, np.where(want.agreed_BT, 0, plain.advantage_BT))
    np.testing.assert_array_equal(masked.return_MBT, plain.return_MBT)
    np.testing.assert_array_equal(masked.explored_BT, want.explored_BT)
    n = int(e.action_BT.sum())
    assert ((masked.advantage_BT == 0) & e.action_BT).sum() == n // 5
    batch = make_batch(e, estimator=GAE(ensemble=masks), entropy_scale=0.5)
    np.testing.assert_array_equal(batch.entropy_BT, np.where(want.explored_BT, 0.5, 0))


def test_off_is_off():
    assert not EnsembleMask().on
    agreed = EnsembleMask(agreed=0.5)
    for estimator in (GAE(), GAE(ensemble=agreed)):
        assert jax.eval_shape(estimator.__call__, critics(2, same=False)).explored_BT is None
