"""Token statistics: both implementations against float64, values and gradients, and the memory of the tiled one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from ppojax.kernels import reference, tiled, token_stats

WIDTH = 16
# float32 sums over up to 1000 terms of order 1; logits of 80 carry an absolute rounding of 80 * 2^-24 = 5e-6.
TIGHT = {"rtol": 2e-5, "atol": 2e-5}


def inputs(rows: int, vocabulary: int, largest: float = 3.0, seed: int = 0):
    """Hidden states and a head whose logits reach +-`largest`; cotangents of both statistics."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(rows, WIDTH)), rng.normal(size=(vocabulary, WIDTH))
    hidden *= largest / np.abs(hidden @ head.T).max()
    target = rng.integers(0, vocabulary, rows)
    weights = rng.normal(size=(2, rows))
    return (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(head, jnp.float32),
        jnp.asarray(target, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def exact(hidden, head, target, weights, temperature=1.0, softcap=None):
    """logp, entropy, and the gradients of weights . (logp, entropy), in float64."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    rows = np.arange(len(target))
    z = hidden @ head.T
    slope = 1 if softcap is None else 1 - np.tanh(z / softcap) ** 2
    z = (z if softcap is None else softcap * np.tanh(z / softcap)) / temperature
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(1)
    one_hot = np.zeros_like(p)
    one_hot[rows, target] = 1
    d_z = weights[0][:, None] * (one_hot - p) - weights[1][:, None] * p * (log_p + entropy[:, None])
    d_z = d_z * slope / temperature
    return log_p[rows, target], entropy, d_z @ head, d_z.T @ hidden


def run(function, hidden, head, target, weights, **settings):
    """Values and gradients of one implementation, as `exact` returns them."""

    def objective(hidden, head):
        stats = function(hidden, head, target, **settings)
        total = weights[0] @ stats.logp
        return total if stats.entropy is None else total + weights[1] @ stats.entropy, stats

    (_, stats), grads = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(hidden, head)
    return stats.logp, stats.entropy, *grads


def compare(found, expected, **tolerance):
    for name, a, b in zip(("logp", "entropy", "d_hidden", "d_head"), found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, err_msg=name, **tolerance)


@pytest.mark.parametrize("vocabulary", [17, 1000])
@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("rows_per_tile", ["reference", "default", 3, 64, 100])
def test_values_and_gradients(rows, vocabulary, rows_per_tile):
    """One tile that keeps its logits, tiles that divide the rows and tiles that do not."""
    x = inputs(rows, vocabulary)
    if rows_per_tile == "reference":
        found = run(token_stats, *x, entropy=True, implementation="reference")
    elif rows_per_tile == "default":
        found = run(token_stats, *x, entropy=True)
    else:
        found = run(tiled.token_stats, *x, entropy=True, temperature=1.0, rows_per_tile=rows_per_tile)
    compare(found, exact(*x), **TIGHT)


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_logits_of_80(implementation):
    x = inputs(7, 1000, largest=80.0)
    compare(run(token_stats, *x, entropy=True, implementation=implementation), exact(*x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows_per_tile", [3, 7])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature, rows_per_tile):
    x = inputs(7, 17)
    settings = {"entropy": True, "temperature": temperature}
    compare(run(tiled.token_stats, *x, rows_per_tile=rows_per_tile, **settings), exact(*x, temperature), **TIGHT)
    compare(run(token_stats, *x, implementation="reference", **settings), exact(*x, temperature), **TIGHT)


@pytest.mark.parametrize("rows_per_tile", ["reference", 3, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_softcap(temperature, rows_per_tile):
    """Raw logits reach 6, the cap is 4: tanh bends them; then they are divided by the temperature."""
    x = inputs(7, 17, largest=6.0)
    settings = {"entropy": True, "temperature": temperature, "softcap": 4.0}
    if rows_per_tile == "reference":
        found = run(token_stats, *x, implementation="reference", **settings)
    else:
        found = run(tiled.token_stats, *x, rows_per_tile=rows_per_tile, **settings)
    compare(found, exact(*x, temperature, 4.0), **TIGHT)


@pytest.mark.parametrize("rows_per_tile", [3, 7])
def test_without_entropy(rows_per_tile):
    *x, weights = inputs(7, 17)
    logp, entropy, d_hidden, d_head = run(
        tiled.token_stats, *x, weights, entropy=False, temperature=1.0, rows_per_tile=rows_per_tile
    )
    assert entropy is None
    expected = exact(*x, weights * jnp.asarray([[1.0], [0.0]]))
    np.testing.assert_allclose(logp, expected[0], **TIGHT)
    np.testing.assert_allclose(d_hidden, expected[2], **TIGHT)
    np.testing.assert_allclose(d_head, expected[3], **TIGHT)


@pytest.mark.parametrize("rows_per_tile", [8, 30])
@pytest.mark.parametrize(("hidden_type", "head_type"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_bfloat16(hidden_type, head_type, rows_per_tile):
    """Products of bfloat16 numbers add up in float32, so the values are exact for the rounded inputs."""
    hidden, head, target, weights = inputs(30, 1000)
    hidden, head = hidden.astype(hidden_type), head.astype(head_type)
    found = run(
        tiled.token_stats, hidden, head, target, weights, entropy=True, temperature=1.0, rows_per_tile=rows_per_tile
    )
    expected = exact(hidden, head, target, weights)
    assert [x.dtype for x in found] == ["float32", "float32", hidden_type, head_type]
    np.testing.assert_allclose(found[0], expected[0], **TIGHT)
    np.testing.assert_allclose(found[1], expected[1], **TIGHT)
    for a, b in zip(found[2:], expected[2:], strict=True):
        # d_z and the result are rounded to 8 bits once each (2^-8 = 0.4%), relative to the largest entry.
        assert np.abs(np.asarray(a, np.float64) - b).max() < 0.008 * np.abs(b).max()


def test_head_gradient_accumulates_in_float32():
    """256 equal contributions of a bfloat16 head: summed in bfloat16 the total would stall at 2^8 of them."""
    hidden = jnp.ones((512, 1), jnp.bfloat16)
    head = jnp.zeros((2, 1), jnp.bfloat16)
    target = jnp.zeros(512, jnp.int32)

    def total(head):
        return tiled.token_stats(hidden, head, target, temperature=1.0, entropy=False, rows_per_tile=1).logp.sum()

    np.testing.assert_array_equal(np.asarray(jax.grad(total)(head), np.float32), [[256.0], [-256.0]])


def test_finite_differences():
    hidden, head, target, weights = inputs(5, 17)

    def objective(hidden, head):
        hidden, head = jnp.asarray(hidden), jnp.asarray(head)
        stats = tiled.token_stats(hidden, head, target, temperature=0.7, entropy=True, rows_per_tile=2)
        return weights[0] @ stats.logp + weights[1] @ stats.entropy

    check_grads(objective, (hidden, head), order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)


def test_a_near_certain_token_keeps_a_gradient():
    """p = 1 - 1e-4: the gradient through logp is 1 - p, not the difference of two rounded numbers in bfloat16."""
    hidden, head = jnp.ones((1, 1), jnp.bfloat16), jnp.asarray([[9.25], [0.0]], jnp.bfloat16)
    found = run(
        tiled.token_stats, hidden, head, jnp.zeros(1, jnp.int32), jnp.ones((2, 1)), temperature=1.0, entropy=False
    )
    expected = 1 / (1 + np.exp(9.25))
    np.testing.assert_allclose(np.asarray(found[3], np.float32), [[expected], [-expected]], rtol=0.005)


def test_no_rows():
    hidden, head = jnp.zeros((0, WIDTH)), jnp.ones((17, WIDTH))
    stats = token_stats(hidden, head, jnp.zeros(0, jnp.int32), entropy=True)
    assert stats.logp.shape == stats.entropy.shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    x = inputs(1, 17)[:3]
    with pytest.raises(ValueError, match=r"temperature is .*, expected a number above 0"):
        token_stats(*x, temperature=temperature)


@pytest.mark.parametrize("softcap", [0.0, -1.0])
def test_softcap_must_be_positive(softcap):
    with pytest.raises(ValueError, match=r"softcap is .*, expected a number above 0, or None"):
        token_stats(*inputs(1, 17)[:3], softcap=softcap)


def test_tiles_stay_within_their_budget():
    for rows, vocabulary in [(1, 50_000), (1365, 49_152), (1366, 49_152), (8192, 151_936), (100, 10**9)]:
        per_tile = tiled.tile_rows(rows, vocabulary)
        kept = 4 * rows * vocabulary <= tiled.KEEP_BYTES
        assert per_tile == rows if kept else per_tile < rows
        assert kept or 4 * per_tile * vocabulary <= tiled.TILE_BYTES or per_tile == 8


def temporary_bytes(function, rows, width, vocabulary, **settings) -> int:
    def objective(hidden, head, target):
        stats = function(hidden, head, target, temperature=1.0, entropy=True, **settings)
        return stats.logp.sum() + stats.entropy.sum()

    shapes = (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    compiled = jax.jit(jax.grad(objective, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_rows_times_vocabulary():
    """At 16,384 rows and a vocabulary of 49,152 all logits would be 3 GiB; a tile is 1/24 of it."""
    rows, width, vocabulary = 16_384, 64, 49_152
    logits = 4 * rows * vocabulary
    found = temporary_bytes(tiled.token_stats, rows, width, vocabulary)
    assert found < logits / 5
    assert found < temporary_bytes(tiled.token_stats, 4 * rows, width, vocabulary) < found + logits / 50
    assert temporary_bytes(reference.token_stats, rows, width, vocabulary) >= logits


def test_sharded_rows():
    """Rows over 8 devices, the head whole on each: the same numbers, and no device gathers all hidden states."""
    x = inputs(64, 17)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    by_row, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = (jax.device_put(x[0], by_row), jax.device_put(x[1], whole), jax.device_put(x[2], by_row), x[3])
    settings = {"temperature": 1.0, "entropy": True, "rows_per_tile": 16}
    compare(run(tiled.token_stats, *placed, **settings), exact(*x), **TIGHT)
    forward = jax.jit(lambda *a: tiled.token_stats(*a, **settings)).lower(*placed[:3]).compile()
    assert "all-gather" not in forward.as_text()
