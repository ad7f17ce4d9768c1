"""Token statistics: both implementations against float64, values and gradients, and the memory of the tiled one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from kernels.cases import EVERY, STATISTICS, Case, case, compare, exact, run
from ppojax.kernels import tiled, token_stats
from ppojax.kernels.sweeps import Ask

# float32 sums over up to 1000 terms of order 1; logits of 80 carry an absolute rounding of 80 * 2^-24 = 5e-6.
TIGHT = {"rtol": 2e-5, "atol": 2e-5}
REST = [(1, 1000), (7, 17), (256, 1000)]
EVERYTHING = {*STATISTICS, "d_hidden", "d_head"}


def by_tiles(rows_per_tile: int):
    """`token_stats` with so many rows in a tile."""

    def function(hidden, head, target, *, reference=None, topk_id_NK=None, temperature=1.0, softcap=None, **asked):
        inputs = tiled.Inputs(hidden, head, target, *(reference or (None, None)), topk_id_NK)
        settings = {"temperature": temperature, "softcap": softcap, "rows_per_tile": rows_per_tile}
        return tiled.token_stats(inputs, ask=Ask(**asked), **settings)

    return function


def by_definition(*arrays, **settings):
    return token_stats(*arrays, implementation="reference", **settings)


IMPLEMENTATIONS = {"reference": by_definition, "default": token_stats} | {
    f"tiles of {n}": by_tiles(n) for n in (3, 100)
}
every_implementation = pytest.mark.parametrize("function", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@every_implementation
@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [(1, 17), (7, 1000), (256, 17), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in REST)],
)
def test_values_and_gradients(rows, vocabulary, function):
    """One tile that keeps its logits, tiles that divide the rows and tiles that do not."""
    c = case(rows, vocabulary)
    found = run(function, c, **EVERY)
    assert found.keys() == EVERYTHING
    compare(found, exact(c, tie=0.0 if function is by_definition else 2e-6), **TIGHT)


@pytest.mark.parametrize(("rows", "function"), [(7, token_stats), (25, by_tiles(10))])
def test_a_real_vocabulary(rows, function):
    """32,771 words, which no power of two divides; expectations add up over all of them."""
    c = case(rows, 32_768 + 3)
    compare(run(function, c, **EVERY), exact(c), rtol=5e-5, atol=5e-5)


@every_implementation
def test_logits_of_80(function):
    """p from 1 to e^-160: log-probabilities carry the rounding of logits of 80, divergences that of their gaps."""
    c = case(7, 1000, largest=80.0)
    compare(run(function, c, **EVERY), exact(c), rtol=1e-4, atol=2e-3)


@every_implementation
@pytest.mark.parametrize(("temperature", "softcap"), [(0.5, None), (2.0, None), (1.0, 4.0), (0.7, 4.0)])
def test_temperature_and_softcap(temperature, softcap, function):
    """Raw logits reach 6, the cap is 4: tanh bends them; then they are divided by the temperature."""
    c = case(7, 17, largest=6.0)
    found = run(function, c, temperature=temperature, softcap=softcap, **EVERY)
    compare(found, exact(c, temperature, softcap), **TIGHT)


@every_implementation
@pytest.mark.parametrize("asked", ["nothing", "entropy", "kl", "reverse_kl", "tv", "topk_logp"])
def test_only_what_is_asked_for(asked, function):
    c = case(7, 17)
    settings = {asked: True} if asked in EVERY else {}
    if asked != "topk_logp":
        settings["topk_id_NK"] = None
    found = run(function, c, **settings)
    assert found.keys() == {"logp", "d_hidden", "d_head"} | ({asked} - {"nothing"})
    c["weights"] |= {n: 0 * w for n, w in c["weights"].items() if n not in found}
    compare(found, exact(c), **TIGHT)


@every_implementation
def test_the_policy_against_itself(function):
    """Divergences are rounding of logits, squared; by the definition's sums, rounding. They have no slope."""
    c = case(7, 1000)
    c |= {"other": c["hidden"], "other_head": c["head"]}
    c["weights"] |= {n: 0 * c["weights"][n] for n in ("logp", "entropy", "topk_logp")}
    found = run(function, c, **EVERY)
    for name in ("kl", "reverse_kl", "tv"):
        np.testing.assert_allclose(found[name], 0.0, atol=1e-6)
    if function is not by_definition:  # there, rounding takes sides
        np.testing.assert_allclose(found["d_hidden"], 0.0, atol=1e-6)
        np.testing.assert_allclose(found["kl"], 0.0, atol=1e-12)


@every_implementation
def test_nearly_the_policy_itself(function):
    """KL of a gap of 1e-3 is some 1e-7: the terms of p log p/q, of 1e-3 each, would leave nothing of it in float32."""
    c = case(7, 1000)
    c |= {"other": (c["hidden"] * 1.001).astype(np.float32), "other_head": c["head"]}
    found, expected = run(function, c, **EVERY), exact(c)
    assert 1e-8 < expected["kl"].max() < 1e-5
    tolerance = 1e-6 if function is by_definition else 0.02 * expected["kl"].max()
    np.testing.assert_allclose(found["kl"], expected["kl"], atol=tolerance)
    np.testing.assert_allclose(found["reverse_kl"], expected["reverse_kl"], atol=tolerance)


@every_implementation
def test_policies_with_nothing_in_common(function):
    """Each is sure of another word: TV is 1, its slope 0 where nothing can be gained by a small step."""
    c = case(2, 17)
    c |= {"hidden": np.eye(2, 16, dtype=np.float32) * 200, "head": np.eye(17, 16, dtype=np.float32)}
    c |= {"other": np.eye(2, 12, k=2, dtype=np.float32) * 200, "other_head": np.eye(17, 12, dtype=np.float32)}
    found = run(function, c, **EVERY)
    np.testing.assert_allclose(found["tv"], 1.0, atol=1e-6)
    np.testing.assert_allclose(found["kl"], 200.0, rtol=1e-5)
    assert np.isfinite(found["d_hidden"]).all() and np.isfinite(found["d_head"]).all()


@every_implementation
def test_masked_rows_leave_no_trace(function):
    """A row whose statistics nobody weighs gives no gradient, however extreme it is."""
    c = case(3, 17)
    c["hidden"][1] *= 1e4
    for name, w in c["weights"].items():
        w[1] = 0
        assert name in STATISTICS
    found = run(function, c, **EVERY)
    np.testing.assert_array_equal(found["d_hidden"][1], 0.0)
    without = Case({n: np.delete(x, 1, 0) if n not in ("head", "other_head", "weights") else x for n, x in c.items()})
    without["weights"] = {n: np.delete(w, 1, 0) for n, w in c["weights"].items()}
    np.testing.assert_allclose(found["d_head"], exact(without)["d_head"], **TIGHT)


def test_no_gradient_reaches_the_reference():
    c = case(7, 17)

    def total(other, other_head):
        arrays = (c["hidden"], c["head"], c["target"])
        stats = token_stats(*map(jnp.asarray, arrays), reference=(other, other_head), **EVERY)
        return (stats.kl + stats.reverse_kl + stats.tv).sum()

    for grad in jax.jit(jax.grad(total, (0, 1)))(jnp.asarray(c["other"]), jnp.asarray(c["other_head"])):
        np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("rows_per_tile", [8, 30])
@pytest.mark.parametrize(("hidden_type", "head_type"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_bfloat16(hidden_type, head_type, rows_per_tile):
    """Products of bfloat16 numbers add up in float32, so the values are exact for the rounded inputs."""
    c = case(30, 1000)
    c |= {"hidden": jnp.asarray(c["hidden"], hidden_type), "head": jnp.asarray(c["head"], head_type)}
    found, expected = run(by_tiles(rows_per_tile), c, **EVERY), exact(c)
    assert {n: str(x.dtype) for n, x in found.items()} == {
        **dict.fromkeys(STATISTICS, "float32"), "d_hidden": hidden_type, "d_head": head_type,
    }  # fmt: skip
    for name in STATISTICS:
        np.testing.assert_allclose(found[name], expected[name], **TIGHT)
    for name in ("d_hidden", "d_head"):
        # d_z and the result are rounded to 8 bits once each (2^-8 = 0.4%), relative to the largest entry.
        error = np.abs(np.asarray(found[name], np.float64) - expected[name]).max()
        assert error < 0.008 * np.abs(expected[name]).max()


def test_head_gradient_accumulates_in_float32():
    """256 equal contributions of a bfloat16 head: summed in bfloat16 the total would stall at 2^8 of them."""
    hidden = jnp.ones((512, 1), jnp.bfloat16)
    head = jnp.zeros((2, 1), jnp.bfloat16)
    target = jnp.zeros(512, jnp.int32)

    def total(head):
        return by_tiles(1)(hidden, head, target).logp.sum()

    np.testing.assert_array_equal(np.asarray(jax.jit(jax.grad(total))(head), np.float32), [[256.0], [-256.0]])


def test_finite_differences():
    c = case(5, 17)
    weights = {n: jnp.asarray(w) for n, w in c["weights"].items()}

    def objective(hidden, head):
        arrays = (jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(c["target"]))
        other = (jnp.asarray(c["other"]), jnp.asarray(c["other_head"]))
        stats = by_tiles(2)(*arrays, reference=other, topk_id_NK=jnp.asarray(c["ids"]), temperature=0.7, **EVERY)
        return sum(jnp.sum(weights[n] * x) for n, x in stats._asdict().items() if x is not None)

    check_grads(jax.jit(objective), (c["hidden"], c["head"]), order=1, modes=["rev"], eps=1e-2, atol=5e-3, rtol=5e-3)


def test_a_near_certain_token_keeps_a_gradient():
    """p = 1 - 1e-4: the gradient through logp is 1 - p, not the difference of two rounded numbers in bfloat16."""
    hidden, head = jnp.ones((1, 1), jnp.bfloat16), jnp.asarray([[9.25], [0.0]], jnp.bfloat16)
    d_head = jax.jit(jax.grad(lambda head: by_tiles(1)(hidden, head, jnp.zeros(1, jnp.int32)).logp[0]))(head)
    expected = 1 / (1 + np.exp(9.25))
    np.testing.assert_allclose(np.asarray(d_head, np.float32), [[expected], [-expected]], rtol=0.005)


def test_no_rows():
    stats = token_stats(jnp.zeros((0, 16)), jnp.ones((17, 16)), jnp.zeros(0, jnp.int32), entropy=True)
    assert stats.logp.shape == stats.entropy.shape == (0,)


REFUSED = [
    ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
    ({"temperature": float("nan")}, "temperature is nan, expected a number above 0"),
    ({"softcap": -1.0}, "softcap is -1.0, expected a number above 0, or None"),
    ({"kl": True}, "kl, reverse_kl and tv compare with a reference"),
    ({"tv": True, "reference": (jnp.ones((3, 4)), jnp.ones((18, 4)))}, "reference .3, 4., .18, 4. does not fit"),
    ({"topk_id_NK": jnp.zeros((2, 1), jnp.int32)}, "topk_id .2, 1. does not fit N = 3"),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED, ids=[text[:20] for _, text in REFUSED])
def test_bad_arguments(settings, text):
    with pytest.raises(ValueError, match=text):
        token_stats(jnp.ones((3, 16)), jnp.ones((17, 16)), jnp.zeros(3, jnp.int32), **settings)


def test_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"disagree: expected .N, D., .V, D. and .N."):
        token_stats(jnp.ones((3, 16)), jnp.ones((17, 8)), jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize(
    ("target", "ids", "text"),
    [
        (17, 0, "target has 17, expected ids from 0 to 16"),
        (-1, 0, "target has -1"),
        (3, 17, "topk_id has 17, .* -1 to"),
    ],
)
def test_ids_outside_the_vocabulary(target, ids, text):
    target_N, id_NK = jnp.asarray([0, target, 1], jnp.int32), jnp.full((3, 2), ids, jnp.int32)
    with pytest.raises(ValueError, match=text):
        token_stats(jnp.ones((3, 16)), jnp.ones((17, 16)), target_N, topk_id_NK=id_NK)


def test_arrays_of_another_rank_or_type():
    target = jnp.zeros(3, jnp.int32)
    for hidden, head, ids in [
        ((3, 4, 16), (17, 16), target),
        ((3, 16), (17,), target),
        ((3, 16), (17, 16), jnp.zeros(3)),
    ]:
        with pytest.raises(ValueError, match="expected matrices, and whole numbers"):
            token_stats(jnp.ones(hidden), jnp.ones(head), ids)


def test_a_target_outside_the_vocabulary_inside_jit():
    """It is no word: logp is -lse, and its own gradient is left out."""
    hidden, head = jnp.ones((1, 2)), jnp.arange(8.0).reshape(4, 2)
    run = jax.jit(jax.value_and_grad(lambda h, target: token_stats(h, head, target).logp[0]))
    want = jax.value_and_grad(lambda h: -jax.nn.logsumexp(h @ head.T))(hidden)
    for target in (9, -1):
        for got, expected in zip(run(hidden, jnp.asarray([target], jnp.int32)), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_tiles_stay_within_their_budget():
    for count, vocabulary in [(1, 50_000), (2730, 49_152), (2731, 49_152), (8192, 151_936), (100, 10**9)]:
        per_tile = tiled.tile_rows(count, vocabulary)
        kept = 4 * count * vocabulary <= tiled.KEEP_BYTES
        assert per_tile == count if kept else per_tile < count
        assert kept or 4 * per_tile * vocabulary <= tiled.TILE_BYTES or per_tile == 8


def temporary_bytes(function, rows, width, vocabulary, dtype="float32", **asked) -> int:
    def objective(hidden, head, target, other, other_head):
        reference = (other, other_head) if asked.get("tv") else None
        stats = function(hidden, head, target, reference=reference, entropy=True, **asked)
        return stats.logp.sum() + stats.entropy.sum() + (stats.tv.sum() if asked.get("tv") else 0)

    policy = [jax.ShapeDtypeStruct((n, width), jnp.dtype(dtype)) for n in (rows, vocabulary)]
    shapes = (*policy, jax.ShapeDtypeStruct((rows,), jnp.int32), *policy)
    compiled = jax.jit(jax.grad(objective, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("tv", [False, True])
def test_memory_does_not_grow_with_rows_times_vocabulary(tv):
    """At 16,384 rows and a vocabulary of 49,152 all logits would be 3 GiB; a tile is 1/24 of it."""
    rows, width, vocabulary = 16_384, 64, 49_152
    logits = 4 * rows * vocabulary
    found = temporary_bytes(token_stats, rows, width, vocabulary, tv=tv)
    assert found < logits / 5
    assert found < temporary_bytes(token_stats, 4 * rows, width, vocabulary, tv=tv) < found + logits / 50
    assert temporary_bytes(by_definition, rows, width, vocabulary, tv=tv) >= logits


def test_real_shapes_need_little_memory():
    """8192 tokens, 151,936 words: logits of policy and reference are 4.6 GiB each, and naively held more than once.

    A CPU has no products of bfloat16: there XLA makes the heads float32 first, 1.2 GiB each, ahead of the tiles; with a
    newer jax both in the forward and in the backward. `benchmarks/token_stats_memory.py` compiles for a GPU, where it
    does not.
    """
    shapes, upcast = (8192, 2048, 151_936), 4 * 151_936 * 2048 * (1 if jax.__version_info__ < (0, 11) else 2)
    assert temporary_bytes(token_stats, *shapes, dtype="float32", kl=True, tv=True) < 0.6 * 2**30
    assert temporary_bytes(token_stats, *shapes, dtype="bfloat16") < upcast + 0.7 * 2**30
    assert temporary_bytes(by_definition, *shapes, dtype="float32") > 9.5 * 2**30


def test_sharded_rows():
    """Rows over 8 devices by their arguments' shardings alone: no device gathers all hidden states."""
    c = case(64, 17)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    by_row, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    c |= {"hidden": jax.device_put(c["hidden"], by_row), "head": jax.device_put(c["head"], everywhere)}
    c["weights"] |= {n: 0 * w for n, w in c["weights"].items() if n not in ("logp", "entropy", "topk_logp")}
    compare(run(by_tiles(16), c, entropy=True), exact(c), **TIGHT)
    target = jax.device_put(c["target"], by_row)
    forward = jax.jit(lambda *a: by_tiles(16)(*a, entropy=True)).lower(c["hidden"], c["head"], target).compile()
    assert "all-gather" not in forward.as_text()
