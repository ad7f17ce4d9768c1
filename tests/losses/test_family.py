"""The policy losses against loops in float64, at their edges, and where one of them is another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from policy_losses import LOSSES
from ppojax.losses import (
    CISPO,
    CPPO,
    DIS,
    DPPO,
    DRPO,
    GSPO,
    IPO,
    NLL,
    Aggregation,
    Correction,
    MiniRL,
    PPOClip,
    Reinforce,
)
from ppojax.losses.policy import PolicyLoss
from ppojax.types import Batch, LossOut, TokenStats
from small_batch import experience_of

B, T = 6, 9
# What a token's loss is, and its slope in log pi, from: A, mu, pi_old and pi of a row's actions, and which one it is.
Row = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], list[tuple[float, float]]]


def inputs(seed: int = 0) -> tuple[Batch, TokenStats]:
    """Rows of 0 to T actions, some advantages 0, policies a good deal apart."""
    rng = np.random.default_rng(seed)
    action = rng.random((B, T)) < 0.7
    action[0], action[1] = False, [True] + [False] * (T - 1)
    action[:, -1] = False
    mu = rng.uniform(-3, -0.02, (B, T))
    old, now = (np.minimum(mu + rng.normal(0, spread, (B, T)), -1e-3) for spread in (0.2, 0.7))
    a = np.where(rng.random((B, T)) < 0.15, 0.0, rng.normal(size=(B, T)))
    experience = experience_of(action, behavior=np.where(action, mu, 0), old=np.where(action, old, 0))
    return Batch(experience, jnp.asarray(np.where(action, a, 0), jnp.float32)), TokenStats(
        jnp.asarray(now, jnp.float32)
    )


def both(loss: PolicyLoss, batch: Batch, stats: TokenStats) -> tuple[LossOut, np.ndarray]:
    def total(logp: jax.Array) -> tuple[jax.Array, LossOut]:
        out = loss(stats._replace(logp=logp), batch)
        return out.sum, out

    (_, out), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(stats.logp)
    return out, np.asarray(slope)


def by_loops(row: Row, batch: Batch, stats: TokenStats) -> tuple[float, np.ndarray]:
    """Sum of the losses of the tokens, and slopes [B, T], in float64."""
    e = batch.experience
    mask = np.asarray(e.action_BT)
    columns = [np.asarray(x, np.float64) for x in (batch.advantage_BT, e.logp_behavior_BT, e.logp_old_BT, stats.logp)]
    total, slope = 0.0, np.zeros((B, T))
    for b in range(B):
        found = row(*(x[b][mask[b]] for x in columns))
        total += math.fsum(value for value, _ in found)
        slope[b, mask[b]] = [d for _, d in found]
    return total, slope


def weighted(weight: Callable[..., float]) -> Row:
    """Losses of the form -A w log pi, w a constant."""

    def row(a: np.ndarray, mu: np.ndarray, old: np.ndarray, now: np.ndarray) -> list[tuple[float, float]]:
        out = []
        for t in range(len(a)):
            rho, r, p = math.exp(now[t] - mu[t]), math.exp(now[t] - old[t]), math.exp(mu[t])
            w = weight(a=a[t], rho=rho, r=r, mu=p, gap=_gap(now[t], mu[t]))
            out.append((-a[t] * w * now[t], -a[t] * w))
        return out

    return row


def _gap(now: float, mu: float) -> float:
    return math.exp(now) - math.exp(mu)


def minirl(a: float, rho: float, r: float, **_: float) -> float:
    return 0.0 if (a > 0 and r > 1.27) or (a < 0 and r < 0.8) else min(rho, 5.0)


def relaxed(a: float, rho: float, mu: float, **_: float) -> float:
    held = (a > 0 and rho > 1.28 and mu >= 0.4) or (a < 0 and rho < 0.8 and mu >= 0.3)
    return 0.0 if held else min(rho, 5.0)


def drpo(a: float, rho: float, gap: float, **_: float) -> float:
    return min(rho, 5.0) * (1 - math.copysign(1, a) * math.copysign(1, rho - 1) * abs(gap) / 0.2) if a else 0.0


def cppo(a: np.ndarray, mu: np.ndarray, old: np.ndarray, now: np.ndarray) -> list[tuple[float, float]]:
    n, out = len(a), []
    moved = np.abs(np.exp(now) - np.exp(mu))
    high = sorted(moved)[max(math.ceil(0.9 * n) - 1, 0)] if n else 0.0
    budget = min(max(high, 0.02), 0.04)
    spent = earned = 0.0
    for t in range(n):
        w = 0.8 + 0.2 * ((n - 1 - t) / (n - 1) if n > 1 else 1.0)
        room = min(0.15, 0.15 + budget * earned - spent)
        rho = math.exp(now[t] - mu[t])
        keep = a[t] * (rho - 1) <= 0 or w * moved[t] <= room
        weight = min(rho, 5.0) if keep else 0.0
        out.append((-a[t] * weight * now[t], -a[t] * weight))
        spent, earned = spent + w * moved[t], earned + w
    return out


def ipo(a: np.ndarray, mu: np.ndarray, old: np.ndarray, now: np.ndarray) -> list[tuple[float, float]]:
    out = []
    for t in range(len(a)):
        x = now[t] - mu[t]
        w = math.exp(x) if abs(_gap(now[t], mu[t])) <= 0.1 else 0.0
        out.append((-a[t] * w * now[t] + 1e-3 * x * x, -a[t] * w + 2e-3 * x))
    return out


def clipped(ratio: float, a: float, low: float, high: float) -> tuple[float, bool]:
    """PPO's loss, and whether its gradient is alive."""
    held = min(max(ratio, 1 - low), 1 + high)
    return max(-a * ratio, -a * held), -a * ratio >= -a * held


def ppo(weight: Callable[[np.ndarray], np.ndarray]) -> Row:
    """PPO's loss times a weight made of the log-ratios log(pi_old/mu) of the row."""

    def row(a: np.ndarray, mu: np.ndarray, old: np.ndarray, now: np.ndarray) -> list[tuple[float, float]]:
        out = []
        for t, w in enumerate(weight(old - mu)):
            ratio = math.exp(now[t] - old[t])
            value, alive = clipped(ratio, a[t], 0.2, 0.2)
            out.append((w * value, -w * a[t] * ratio * alive))
        return out

    return row


def gspo(a: np.ndarray, mu: np.ndarray, old: np.ndarray, now: np.ndarray) -> list[tuple[float, float]]:
    s = math.exp((now - old).mean()) if len(a) else 1.0
    return [(v, -x * s * alive) for x in a for v, alive in [clipped(s, x, 0.1, 0.2)]]


SUM = Aggregation()  # its sum is the sum over tokens
ROWS: dict[str, Row] = {
    "reinforce": weighted(lambda rho, **_: min(rho, 5.0)),
    "reinforce without weights": weighted(lambda **_: 1.0),
    "cispo": weighted(lambda rho, **_: min(rho, 1.5)),
    "cispo low": weighted(lambda rho, **_: min(max(rho, 0.8), 1.5)),
    "cispo old": weighted(lambda r, **_: min(r, 1.5)),
    "minirl": weighted(minirl),
    "ratios of rare tokens relaxed": weighted(relaxed),
    "dis": weighted(lambda rho, **_: rho if 0.7 < rho < 2.0 else 0.0),
    "ipo": ipo,
    "drpo": weighted(drpo),
    "cppo": cppo,
    "gspo": gspo,
    "tis": ppo(lambda x: np.minimum(np.exp(x), 1.1)),
    "decoupled": ppo(np.exp),
    "icepop": ppo(lambda x: np.exp(x) * (np.exp(x) >= 0.9) * (np.exp(x) <= 1.1)),
    "mis sequence": ppo(lambda x: np.full(len(x), np.exp(x.sum()) * (0.8 <= np.exp(x.sum()) <= 1.25))),
    "rows masked, tokens weighed": ppo(lambda x: np.exp(x) * (0.95 <= np.exp(x.mean()) <= 1.1) if len(x) else x),
    "rows rejected": ppo(lambda x: np.full(len(x), float(0.8 <= np.exp(x.sum()) <= 1.25))),
    "tis geometric": ppo(lambda x: np.full(len(x), np.clip(np.exp(x.mean()), 0.99, 1.05)) if len(x) else x),
}
CASES = {name: (LOSSES[name], row) for name, row in ROWS.items()}


@pytest.mark.parametrize("name", CASES)
def test_values_and_slopes(name: str) -> None:
    loss, row = CASES[name]
    batch, stats = inputs()
    out, slope = both(loss, batch, stats)
    total, want = by_loops(row, batch, stats)
    np.testing.assert_allclose(out.sum, total, rtol=2e-5)
    np.testing.assert_allclose(slope, want, rtol=2e-5, atol=1e-6)
    assert float(out.weight) == np.asarray(batch.experience.action_BT).sum()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out.metrics))


@pytest.mark.parametrize("name", CASES)
def test_edges(name: str) -> None:
    """Nothing moves without advantage or without actions; probabilities near 0 and 1 give finite numbers."""
    loss, _ = CASES[name]
    batch, stats = inputs(1)
    pull = loss.pull if isinstance(loss, IPO) else 0.0
    if not pull:
        _, slope = both(loss, batch._replace(advantage_BT=jnp.zeros((B, T))), stats)
        assert not slope.any()
    none = batch.experience._replace(action_BT=jnp.zeros((B, T), bool))
    out, slope = both(loss, batch._replace(experience=none), stats)
    assert not slope.any() and float(out.weight) == 0 == float(out.sum)
    for mu, now in ((0.0, -900.0), (-900.0, 0.0), (-900.0, -900.0), (0.0, 0.0)):
        at = np.full((B, T), mu)
        edge = experience_of(np.ones((B, T)), behavior=at, old=at)
        found = both(loss, batch._replace(experience=edge), TokenStats(jnp.full((B, T), now)))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), (mu, now)


LIMITS: dict[str, tuple[PolicyLoss, PolicyLoss]] = {
    "dppo without a region": (DPPO(delta_low=1.0, delta_high=1.0), Reinforce()),
    "cispo with the same cap": (CISPO(), Reinforce()),
    "drpo of an endless region": (DRPO(delta=1e9), Reinforce()),
    "cppo of an endless region": (CPPO(delta=1e9), Reinforce()),
    "ipo of an endless region": (IPO(delta=2.0, pull=0.0, cap=5.0), Reinforce()),
    "minirl of an endless region": (MiniRL(clip_low=1.0, clip_high=1e9), Reinforce()),
    "dis of an endless region": (DIS(clip_low=1.0, clip_high=1e9), Reinforce(cap=math.inf)),
    "a correction of nothing": (PPOClip(correction=Correction(method="truncate", low=1.0, high=1.0 + 1e-9)), PPOClip()),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str) -> None:
    one, other = LIMITS[name]
    batch, stats = inputs(2)
    (got, got_slope), (want, want_slope) = both(one, batch, stats), both(other, batch, stats)
    np.testing.assert_allclose(got.sum, want.sum, rtol=1e-6)
    np.testing.assert_allclose(got_slope, want_slope, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "ipo"])
def test_on_policy_every_loss_is_reinforce(name: str) -> None:
    """mu = pi_old = pi: ratios are 1, no token is outside, and the slope is -A."""
    loss, _ = CASES[name]
    batch, stats = inputs(3)
    logp = jnp.where(batch.experience.action_BT, stats.logp, 0.0)
    same = batch.experience._replace(logp_behavior_BT=logp, logp_old_BT=logp)
    _, slope = both(loss, batch._replace(experience=same), TokenStats(logp))
    np.testing.assert_allclose(slope, -np.asarray(batch.advantage_BT), rtol=1e-6, atol=1e-7)


def test_one_token_of_gspo_is_ppo() -> None:
    batch, stats = inputs(4)
    one = batch.experience._replace(action_BT=jnp.asarray(np.arange(T) == 2)[None].repeat(B, 0))
    batch = batch._replace(experience=one)
    g = GSPO(clip_low=0.2, clip_high=0.28, aggregation=SUM)
    p = PPOClip(clip_low=0.2, clip_high=0.28)
    (got, got_slope), (want, want_slope) = both(g, batch, stats), both(p, batch, stats)
    np.testing.assert_allclose(got.sum, want.sum, rtol=1e-6)
    np.testing.assert_allclose(got_slope, want_slope, rtol=1e-6)


def test_what_is_needed() -> None:
    needs = {name: loss.needs for name, (loss, _) in CASES.items()}
    with_old = {"cispo old", "minirl", "gspo", "tis", "decoupled", "icepop", "mis sequence", "tis geometric"}
    with_old |= {"rows masked, tokens weighed", "rows rejected"}
    assert {name for name, what in needs.items() if what == {"logp_old"}} == with_old
    assert {name for name, what in needs.items() if not what} == CASES.keys() - with_old
    batch, stats = inputs()
    bare: Any = batch._replace(experience=batch.experience._replace(logp_old_BT=None))
    for name in sorted(with_old):
        with pytest.raises(AssertionError, match="logp_old"):
            CASES[name][0](stats, bare)


def test_a_correction_in_the_wrong_order_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"low \(3\.0\) must be under high \(2\.0\)"):
        Correction(low=3.0)
    with pytest.raises(ValidationError, match=r"weight=token is for method=mask; set weight=level"):
        Correction(method="truncate", weight="token")


def test_what_says_it_is_off_policy_looks_at_the_sampler() -> None:
    """Its gradient depends on mu where pi and pi_old stay, and no other one's does."""
    losses = [
        *(kind(anchor=anchor) for kind in (CISPO, DPPO, GSPO, PPOClip) for anchor in ("behavior", "old")),
        *(kind(correction=Correction(method="truncate")) for kind in (GSPO, PPOClip)),
        *(Reinforce(importance_weight=weight) for weight in (True, False)),
        *(CPPO(), DIS(), DRPO(), IPO(), MiniRL(), NLL()),
    ]
    batch, stats = inputs(5)
    e = batch.experience

    @jax.jit
    def slopes(behavior_BT: jax.Array) -> list[jax.Array]:
        moved = batch._replace(experience=e._replace(logp_behavior_BT=behavior_BT))
        return [jax.grad(lambda logp, of=loss: of(stats._replace(logp=logp), moved).sum)(stats.logp) for loss in losses]

    nearer_BT = jnp.where(e.action_BT, 0.5 * (e.logp_behavior_BT + stats.logp), 0.0)
    for loss, one, other in zip(losses, slopes(e.logp_behavior_BT), slopes(nearer_BT), strict=True):
        assert loss.off_policy != np.array_equal(one, other), loss
