"""DPPO by hand: six tokens in and out of the trust region, for both signs of the advantage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from ppojax.losses import DPPO, Aggregation, KLPenalty, PPOClip
from ppojax.types import Batch, LossOut, Recorded, Records, TokenStats
from small_batch import experience_of, rows_of, token_row

# Token:         rises far  rises a bit  falls far  falls a bit  comes back  comes back
MU = np.asarray([0.20,      0.40,        0.80,      0.50,        0.20,       0.80])  # fmt: skip
PI = np.asarray([0.60,      0.50,        0.30,      0.40,        0.60,       0.30])  # fmt: skip
A = np.asarray([2.0,        0.5,         -1.0,      -3.0,        -0.7,       0.3])  # fmt: skip
# |mu - pi| = .4 .1 .5 .1 .4 .5: tokens 0 and 2 leave the region of 0.2; 4 and 5 are outside too, but go back toward it.
INSIDE = np.asarray([0, 1, 0, 1, 1, 1])


def batch(a=A, mu=MU, **kwargs) -> Batch:
    return token_row(a, behavior=np.log(mu), **kwargs)


def stats(pi=PI, entropy=None) -> TokenStats:
    return TokenStats(jnp.log(jnp.asarray([pi], jnp.float32)), entropy)


def slope(loss, b: Batch, s: TokenStats) -> np.ndarray:
    return np.asarray(jax.grad(lambda logp: loss(s._replace(logp=logp), b).sum)(s.logp))


def check(loss, b: Batch, s: TokenStats, coefficient: np.ndarray) -> LossOut:
    """The loss is sum of coefficient * log pi, and the coefficient is its gradient."""
    out = jax.jit(loss.__call__)(s, b)
    np.testing.assert_allclose(out.sum, np.sum(coefficient * np.log(PI)), rtol=1e-5)
    np.testing.assert_allclose(slope(loss, b, s)[0], coefficient, rtol=1e-5, atol=1e-7)
    return out


def test_total_variation():
    out = check(DPPO(), batch(), stats(), -A * (PI / MU) * INSIDE)
    assert out.weight == 6
    share = {name: float(m.sum / m.weight) for name, m in out.metrics.items() if name != "trust_region/tv_max"}
    assert share["trust_region/masked_frac"] == pytest.approx(2 / 6)
    assert share["trust_region/masked_frac_pos"] == pytest.approx(1 / 3)
    assert share["trust_region/masked_frac_neg"] == pytest.approx(1 / 3)
    assert share["trust_region/tv_mean"] == pytest.approx(2.0 / 6)
    assert float(out.metrics["trust_region/tv_max"].value) == pytest.approx(0.5)
    assert share["actor/ppo_kl"] == pytest.approx(np.mean(np.log(MU / PI)), rel=1e-5)
    kl = MU * np.log(MU / PI) + (1 - MU) * np.log((1 - MU) / (1 - PI))
    assert share["trust_region/kl_mean"] == pytest.approx(kl.mean(), rel=1e-5)


def test_written_out():
    """The same with every number a literal: rho = 1.25 and .8, 3 and .375 on the tokens that count."""
    coefficient = np.asarray([0, -0.5 * 1.25, 0, 3.0 * 0.8, 0.7 * 3.0, -0.3 * 0.375])
    check(DPPO(), batch(), stats(), coefficient)


def test_kl():
    """KL over {a, not a} is .382 .0202 .534 .0204 .382 .534: the default 0.05 and 0.02 part at the second token."""
    check(DPPO(divergence="kl"), batch(), stats(), -A * (PI / MU) * INSIDE)
    tight = DPPO(divergence="kl", delta_high=0.02, delta_low=0.03)
    check(tight, batch(), stats(), -A * (PI / MU) * np.asarray([0, 0, 0, 1, 1, 1]))


def test_each_side_has_its_delta():
    high = DPPO(delta_low=0.05, delta_high=0.45)
    check(high, batch(), stats(), -A * (PI / MU) * np.asarray([1, 1, 0, 0, 1, 1]))
    low = DPPO(delta_low=0.55, delta_high=0.05)
    check(low, batch(), stats(), -A * (PI / MU) * np.asarray([0, 0, 1, 1, 1, 1]))


def test_cap():
    check(DPPO(cap=2.0), batch(), stats(), -A * np.minimum(PI / MU, 2.0) * INSIDE)


def test_huge_delta_is_the_importance_sampled_policy_gradient():
    loss = DPPO(delta_low=1e9, delta_high=1e9, cap=float("inf"))
    out = check(loss, batch(), stats(), -A * PI / MU)
    assert out.metrics["trust_region/masked_frac"].sum == 0
    # which is the gradient of -A pi/mu
    surrogate = jax.grad(lambda logp: jnp.sum(-A.astype(np.float32) * jnp.exp(logp) / MU.astype(np.float32)))
    np.testing.assert_allclose(slope(loss, batch(), stats())[0], surrogate(stats().logp[0]), rtol=1e-5)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_on_policy_is_reinforce(divergence):
    check(DPPO(divergence=divergence), batch(mu=PI), stats(), -A)


def test_old_anchor_decides_the_mask_but_not_the_weight():
    """Seen from pi_old = pi nothing has moved, so nothing is masked; the weight is still pi/mu."""
    loss = DPPO(anchor="old")
    assert loss.needs == {"logp_old"}
    check(loss, batch(old=np.log(PI)), stats(), -A * PI / MU)
    check(loss, batch(mu=PI, old=np.log(MU)), stats(), -A * INSIDE)
    with pytest.raises(AssertionError, match="anchor=old, but logp_old was not scored"):
        loss(stats(), batch())


# Whole distributions over four tokens: one token leaves by TV .4 of which the drawn one shows .1, another hardly moves.
WHOLE_MU = np.asarray([[0.30, 0.50, 0.15, 0.05], [0.6, 0.2, 0.1, 0.1]])
WHOLE_PI = np.asarray([[0.40, 0.10, 0.45, 0.05], [0.62, 0.2, 0.1, 0.08]])


def recorded(k: int, advantage=(1.0, 1.0)) -> tuple[Batch, TokenStats]:
    """Three positions of which the last two are actions; token 0 is drawn at both."""
    ids = np.argsort(-WHOLE_MU, axis=1, kind="stable")[:, :k].astype(np.int32)
    behavior, logp = ([[0, *np.log(x[:, 0])]] for x in (WHOLE_MU, WHOLE_PI))
    experience = experience_of([[0, 1, 1]], behavior=behavior)
    kept = Recorded(jnp.asarray(ids[None]), jnp.asarray(np.log(np.take_along_axis(WHOLE_MU, ids, 1)))[None])
    pad = [[0, 0], [0, 1], [0, 0]]  # a filler position, as packing leaves it
    kept = Recorded(*(jnp.pad(x, pad).astype(x.dtype) for x in kept[:2]))
    e = experience._replace(recorded=kept)
    topk = jnp.pad(jnp.asarray(np.log(np.take_along_axis(WHOLE_PI, ids, 1)), jnp.float32)[None], pad)
    tv, kl = 0.5 * np.abs(WHOLE_MU - WHOLE_PI).sum(1), (WHOLE_MU * np.log(WHOLE_MU / WHOLE_PI)).sum(1)
    full = [jnp.asarray([[0, *x]], jnp.float32) for x in (tv, kl)]
    s = TokenStats(jnp.asarray(logp, jnp.float32), reverse_kl=full[1], tv=full[0], topk_logp=topk)
    return Batch(e, jnp.asarray([[0.0, *advantage]], jnp.float32)), s


@pytest.mark.parametrize(
    ("support", "masked", "tv"),
    [("binary", [1, 1], 0.1), ("topk", [0, 1], 0.4), ("full", [0, 1], 0.4)],
)
def test_a_finer_support_masks_what_the_drawn_token_does_not_show(support, masked, tv):
    """With K = 2 the first token's parts are {1} {0} and a rest that gains .3."""
    loss = DPPO(support=support, top_k=2)
    b, s = recorded(2)
    out = loss(s, b)
    np.testing.assert_allclose(
        slope(loss, b, s)[0, 1:], -np.asarray(masked) * WHOLE_PI[:, 0] / WHOLE_MU[:, 0], rtol=1e-5
    )
    assert float(out.metrics["trust_region/tv_max"].value) == pytest.approx(tv, abs=1e-6)
    assert ("trust_region/order_violation_frac" in out.metrics) == (support != "binary")
    back = recorded(2, advantage=(-1.0, -1.0))[0]  # both have risen, which A < 0 takes back
    assert slope(loss, back, s)[0, 1:].all()


def test_kl_over_each_support():
    b, s = recorded(2)
    kl = {}
    for support in ("binary", "topk", "full"):
        out = DPPO(support=support, divergence="kl", top_k=2)(s, b)
        kl[support] = float(out.metrics["trust_region/kl_mean"].sum)
    mu, pi = (np.stack([x[:, 0], x[:, 1], x[:, 2:].sum(1)]) for x in (WHOLE_MU, WHOLE_PI))
    assert kl["topk"] == pytest.approx((mu * np.log(mu / pi)).sum(), abs=1e-5)
    assert kl["full"] == pytest.approx((WHOLE_MU * np.log(WHOLE_MU / WHOLE_PI)).sum(), abs=1e-5)
    assert kl["binary"] < kl["topk"] < kl["full"]


def test_what_the_sampler_must_keep():
    assert DPPO().records == Records() and PPOClip().records == Records()
    assert DPPO(support="topk", top_k=7).records == Records(7, hidden=False)
    assert DPPO(support="full").records == Records(0, hidden=True)
    assert DPPO(compare_supports=True).records == Records(20, hidden=True)


def test_supports_out_of_order_are_counted():
    loss, (b, s) = DPPO(support="topk", top_k=2, compare_supports=True), recorded(2)
    assert loss(s, b).metrics["trust_region/order_violation_frac"] == (0, 2)
    short = s._replace(tv=s.tv - jnp.asarray([[0.0, 0.25, 0.0]]))
    out = loss(short, b).metrics
    assert out["trust_region/order_violation_frac"] == (1, 2)
    assert float(out["trust_region/order_excess_max"].value) == pytest.approx(0.25, abs=1e-6)


def test_supports_that_were_not_measured():
    b, s = recorded(2)
    with pytest.raises(AssertionError, match="support=topk, but no top-K log-probabilities were computed"):
        DPPO(support="topk")(s._replace(topk_logp=None), b)
    with pytest.raises(AssertionError, match="support=full, but no TV and KL were computed"):
        DPPO(support="full")(s._replace(tv=None), b)


def test_zero_advantages_are_not_counted():
    out = DPPO()(stats(), batch(a=np.asarray([2.0, 0, 0, 0, 0, 0])))
    assert tuple(out.metrics["trust_region/masked_frac"]) == (1, 1)
    assert tuple(out.metrics["trust_region/masked_frac_neg"]) == (0, 0)
    nothing = DPPO()(stats(), batch(a=np.zeros(6)))
    assert nothing.sum == 0
    assert tuple(nothing.metrics["trust_region/masked_frac"]) == (0, 0)
    np.testing.assert_array_equal(slope(DPPO(), batch(a=np.zeros(6)), stats()), 0)


def test_bad_updates():
    """Token 2 falls by 0.5 with A < 0, token 5 too but with A > 0: one bad update in six."""
    out = DPPO()(stats(), batch(mu=MU + 0.001))
    assert tuple(out.metrics["trust_region/bad_update_frac"]) == (1, 6)


def test_nothing_to_learn_from():
    experience = experience_of([[0, 0]], behavior=[[-1.0, -2.0]])
    b, s = Batch(experience, jnp.asarray([[1.0, -1.0]])), TokenStats(jnp.asarray([[-3.0, -0.5]]))
    out = DPPO()(s, b)
    assert (float(out.sum), float(out.weight)) == (0, 0)
    np.testing.assert_array_equal(slope(DPPO(), b, s), 0)
    assert all(float(m.sum) == 0 for name, m in out.metrics.items() if name != "trust_region/tv_max")


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("logp", [0.0, -1e-8, -60.0, -200.0])
@pytest.mark.parametrize("behavior", [0.0, -1e-8, -60.0, -200.0])
def test_probabilities_near_0_and_1(divergence, logp, behavior):
    loss = DPPO(divergence=divergence, cap=float("inf"))
    for a in (1.0, -1.0):
        b, s = token_row([a], behavior=[behavior]), TokenStats(jnp.asarray([[logp]], jnp.float32))
        out = loss(s, b)
        values = jax.tree.leaves((out, slope(loss, b, s)))
        assert all(np.isfinite(x).all() for x in values)
        # mu = 0 against pi = 1 and the reverse leave the trust region when A asks for more of it.
        if abs(logp - behavior) > 50 and max(logp, behavior) > -1 and np.sign(logp - behavior) == a:
            assert slope(loss, b, s)[0, 0] == 0


def test_overflowing_ratio_is_held_at_exp_20():
    loss = DPPO(delta_high=2.0, cap=float("inf"))
    out = slope(loss, token_row([1.0], behavior=[-500.0]), TokenStats(jnp.asarray([[-1.0]])))
    np.testing.assert_allclose(out, -np.exp(20.0), rtol=1e-5)


def test_fractional_advantages_survive():
    b = batch(a=np.full(6, 1 / 3), mu=PI)
    np.testing.assert_allclose(slope(DPPO(), b, stats())[0], np.full(6, -1 / 3), rtol=1e-6)


def test_entropy_bonus_and_kl_penalty():
    loss = DPPO(entropy_coefficient=0.01, kl=KLPenalty(coefficient=0.1, estimator="k2", importance_cap=None))
    assert loss.entropy
    assert loss.needs == {"logp_ref"}
    entropy = jnp.asarray([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    b, s = batch(mu=PI, ref=np.log(PI) - 0.5), stats(entropy=entropy)
    out = loss(s, b)
    np.testing.assert_allclose(out.sum, np.sum(-A * np.log(PI)) - 0.01 * 21 + 0.1 * 6 * 0.125, rtol=1e-5)
    np.testing.assert_allclose(slope(loss, b, s)[0], -A + 0.1 * 0.5, rtol=1e-5)
    bonus = jax.grad(lambda h: loss(s._replace(entropy=h), b).sum)(entropy)
    np.testing.assert_allclose(bonus, np.full((1, 6), -0.01), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["actor/entropy"], (21, 6))
    np.testing.assert_allclose(out.metrics["actor/kl_loss"], (0.75, 6), rtol=1e-5)
    with pytest.raises(AssertionError, match="no entropy was computed"):
        loss(stats(), b)
    with pytest.raises(AssertionError, match="logp_ref was not scored"):
        loss(s, batch())


def test_entropy_is_reported_without_a_bonus():
    assert not DPPO().entropy
    assert DPPO().needs == frozenset()
    out = DPPO()(stats(entropy=jnp.ones((1, 6))), batch())
    np.testing.assert_allclose(out.metrics["actor/entropy"], (6, 6))


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"])
def test_microbatches_add_up(mode):
    """Values, weights, metrics and gradients of the parts of a batch of ragged rows sum to those of the whole."""
    rng = np.random.default_rng(0)
    B, T = 6, 9
    logp = np.log(rng.uniform(0.05, 0.95, (2, B, T)))
    experience = experience_of(rng.random((B, T)) < rng.random((B, 1)), behavior=logp[0])
    whole = Batch(experience, jnp.asarray(rng.normal(size=(B, T)), jnp.float32))
    s = TokenStats(jnp.asarray(logp[1], jnp.float32))
    loss = DPPO(aggregation=Aggregation(mode=mode, constant=7.0 if mode == "constant" else None))
    out, grad = loss(s, whole), slope(loss, whole, s)
    for size in (1, 3):
        cuts = [(i, i + size) for i in range(0, B, size)]
        parts = [(TokenStats(s.logp[i:j]), rows_of(whole, i, j)) for i, j in cuts]
        outs = [loss(*p) for p in parts]
        np.testing.assert_allclose(sum(o.sum for o in outs), out.sum, rtol=1e-5)
        np.testing.assert_allclose(sum(o.weight for o in outs), out.weight)
        np.testing.assert_allclose(np.concatenate([slope(loss, b, p) for p, b in parts]), grad, rtol=1e-6)
        for name in ("trust_region/masked_frac", "trust_region/kl_mean", "actor/pg_loss"):
            total = np.sum([o.metrics[name] for o in outs], axis=0)
            np.testing.assert_allclose(total, out.metrics[name], rtol=1e-5)


@pytest.mark.parametrize("field", [{"cap": float("nan")}, {"cap": 0.0}, {"delta_low": -0.1}, {"delta": 0.2}])
def test_refused_settings(field):
    with pytest.raises(ValidationError):
        DPPO(**field)
