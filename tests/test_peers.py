"""The same numbers as other libraries give on the same random inputs, where the rule is the same.

`tests/data/peers/peers.npz` has what verl, TRL, OpenRLHF, SkyRL and AReaL computed, in the versions of `versions.json`
beside it; `make_peers.py` made it by importing them. Where a rule differs on purpose, the case says so.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.advantages import GAE, Group
from ppojax.losses import CISPO, DPPO, GSPO, Aggregation, Correction, PPOClip
from ppojax.losses.kl import KLPenalty, kl_estimate
from ppojax.losses.policy import PolicyLoss
from ppojax.losses.value import ValueLoss
from ppojax.types import Advantage, Batch, Ending, Experience, TokenStats
from small_batch import experience_of

PEERS = dict(np.load(Path(__file__).parent / "data" / "peers" / "peers.npz"))
X = {name.removeprefix("input/"): x for name, x in PEERS.items() if name.startswith("input/")}
MASK, N = X["mask"], X["mask"].sum()
B, T = MASK.shape
LAST = np.arange(T)[None] == X["length"][:, None] - 1
GROUPS = [0, 0, 0, 1, 1, 1]
# torch, and so verl and SkyRL, divide a variance by n - 1, and add 1e-8 to it.
BESSEL = math.sqrt((N - 1) / N)
SEQUENCE, ROWS = Aggregation(mode="seq_mean_token_mean"), Aggregation(mode="seq_mean_token_sum")
CONSTANT = Aggregation(mode="constant", constant=20)


def room(x: np.ndarray) -> np.ndarray:
    """One more column, which is never an action."""
    return np.pad(x, ((0, 0), (0, 1)))


def experience(*, scores: bool = False, kl: float = 0.0, groups: list[int] = GROUPS, cut: bool = False) -> Experience:
    """Rewards at all actions, or a row's whole score at its last; with `cut` the first row was truncated."""
    value = room(X["value"])
    value[0, T] = X["value_after"][0]
    return experience_of(
        room(MASK),
        reward=room((X["score"][:, None] * LAST if scores else X["reward"]) - kl * MASK),
        length=X["length"].tolist(),
        ending=[Ending.TRUNCATED if cut and b == 0 else Ending.TERMINATED for b in range(B)],
        group=groups,
        value=value[None],
    )


# --- advantages ----------------------------------------------------------------------------------------------------

RATES = {"gamma": 0.97, "lambda_policy": 0.9, "lambda_value": 0.9}
WHITE = {"scale": "none", "whiten": "batch"}
ADVANTAGES: dict[str, tuple[GAE | Group, Experience, float]] = {
    # verl skips observations. Whitening cannot be turned off there.
    "verl/gae": (GAE(whiten="batch", whiten_floor=1e-4, **RATES), experience(), BESSEL),
    # SkyRL counts them as steps, with the critic's value.
    "skyrl/gae": (GAE(whiten="batch", whiten_floor=1e-4, mask_rule="dense", **RATES), experience(), BESSEL),
    # OpenRLHF counts them as steps, with value 0; it divides by n.
    "openrlhf/gae": (
        GAE(whiten="batch", whiten_floor=1e-4, mask_rule="zero", **RATES),
        experience(scores=True, kl=0.01),
        1.0,
    ),
    # AReaL skips observations and bootstraps a row that hit the limit.
    "areal/gae": (GAE(**RATES), experience(scores=True, cut=True), 1.0),
    "verl/grpo": (Group(), experience(scores=True), 1.0),
    "verl/dr_grpo": (Group(scale="none"), experience(scores=True), 1.0),
    "verl/rloo": (Group(baseline="leave_one_out", scale="none"), experience(scores=True), 1.0),
    "verl/reinforce_plus_plus": (Group(baseline="none", rewards="to_go", **WHITE), experience(), BESSEL),
    "verl/reinforce_plus_plus_baseline": (Group(**WHITE), experience(scores=True), BESSEL),
    "skyrl/grpo": (Group(), experience(scores=True), 1.0),
    "skyrl/rloo": (Group(baseline="leave_one_out", scale="none"), experience(scores=True), 1.0),
    "skyrl/rloo_alone": (
        Group(baseline="leave_one_out", scale="none"),
        experience(scores=True, groups=[0, 0, 0, 1, 1, 2]),
        1.0,
    ),
    "openrlhf/reinforce": (Group(baseline="none", rewards="to_go", **WHITE), experience(scores=True, kl=0.01), 1.0),
    "openrlhf/rloo": (Group(baseline="leave_one_out", scale="none"), experience(scores=True), 1.0),
    "openrlhf/reinforce_baseline": (Group(**WHITE), experience(scores=True), 1.0),
    "openrlhf/group_norm": (Group(epsilon=1e-9), experience(scores=True), 1.0),
    "openrlhf/dr_grpo": (Group(scale="none"), experience(scores=True), 1.0),
}


@pytest.fixture(scope="module")
def advantages() -> dict[str, Advantage]:
    """All of ours, in one program."""
    run = jax.jit(lambda given: {name: ADVANTAGES[name][0](e) for name, e in given.items()})
    return jax.device_get(run({name: e for name, (_, e, _) in ADVANTAGES.items()}))


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    # Two float32 programs that add up a few dozen terms of order 1 in different orders.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(advantages: dict[str, Advantage], name: str) -> None:
    _, e, factor = ADVANTAGES[name]
    ours = advantages[name]
    close(ours.advantage_BT[:, :T] * factor, PEERS[f"{name}/advantage"])
    if ours.return_MBT is not None:
        close(ours.return_MBT[0, :, :T], PEERS[f"{name}/returns"])
    assert e.action_BT.sum() == N


def test_a_group_of_one_learns_nothing_here() -> None:
    """verl 0.9.1 takes mean 0 and deviation 1 for it, so that its whole score is its advantage; ours is 0."""
    lonely = experience(scores=True, groups=[0, 0, 0, 1, 1, 2])
    score = X["score"][5] * MASK[5]
    for name, group in (("grpo", Group()), ("rloo", Group(baseline="leave_one_out", scale="none"))):
        ours = jax.jit(group.__call__)(lonely).advantage_BT[:, :T]
        theirs = PEERS[f"verl/{name}_alone/advantage"]
        close(ours[:5], theirs[:5])
        close(theirs[5], score)
        np.testing.assert_array_equal(ours[5], 0)


def test_rewards_pass_observations_here() -> None:
    """SkyRL 0.3.0 starts REINFORCE++ anew at each observation, so that what follows one does not count before it."""
    theirs = PEERS["skyrl/reinforce_plus_plus/returns"]
    e = experience()
    ours = np.asarray(Group(baseline="none", scale="none", rewards="to_go")(e).advantage_BT)[:, :T]
    observed = (np.arange(T)[None] < X["length"][:, None]) & ~MASK
    behind = observed[:, ::-1].cumsum(1)[:, ::-1] == 0
    close(ours[behind & MASK], theirs[behind & MASK])
    assert not np.allclose(ours[MASK], theirs[MASK], atol=0.1)
    close(ours, PEERS["verl/reinforce_plus_plus/returns"])


# --- losses --------------------------------------------------------------------------------------------------------


def batch(*, behavior: str = "old", rows: bool = False) -> Batch:
    """One experience for all losses; peers with one anchor give it as `old`."""
    e = experience_of(MASK, behavior=X[behavior], old=X["old"], ref=X["ref"], value=X["value"][None])
    a = np.broadcast_to(X["row_advantage"][:, None], (B, T)) if rows else X["advantage"]
    return Batch(e, jnp.asarray(a), jnp.asarray(X["target"])[None])


def clip(low: float, high: float) -> dict[str, float]:
    return {"clip_low": low, "clip_high": high}


def trl(aggregation: Aggregation, **kwargs: float) -> PPOClip:
    k3 = KLPenalty(coefficient=0.05, estimator="k3", importance_cap=None)
    return PPOClip(aggregation=aggregation, kl=k3, **(clip(0.2, 0.28) | kwargs))


TOKENS, K3 = Aggregation(), KLPenalty(coefficient=0.05, estimator="k3", importance_cap=None)
OLD, ROW, MU = batch(), batch(rows=True), batch(behavior="behavior")
POLICIES: dict[str, tuple[PolicyLoss, Batch]] = {
    "verl/ppo": (PPOClip(**clip(0.2, 0.28)), OLD),
    "verl/dual_clip": (PPOClip(dual_clip=1.5), OLD),
    "verl/dppo_tv": (DPPO(delta_low=0.1, delta_high=0.15, cap=1.7), OLD),
    "verl/dppo_kl": (DPPO(divergence="kl", delta_low=0.02, delta_high=0.03, cap=1.7), OLD),
    "verl/gspo": (GSPO(**clip(0.1, 0.1)), OLD),
    "verl/cispo": (CISPO(anchor="old", **clip(0.3, 0.4)), OLD),
    "skyrl/ppo_token_mean": (PPOClip(**clip(0.2, 0.28)), OLD),
    "skyrl/ppo_sequence_mean": (PPOClip(aggregation=SEQUENCE, **clip(0.2, 0.28)), OLD),
    "skyrl/ppo_seq_mean_token_sum_norm": (PPOClip(aggregation=CONSTANT, **clip(0.2, 0.28)), OLD),
    "skyrl/dual_clip": (PPOClip(dual_clip=1.5, **clip(0.2, 0.28)), OLD),
    "skyrl/gspo": (GSPO(**clip(0.1, 0.1)), OLD),
    "skyrl/cispo": (CISPO(anchor="old", **clip(0.3, 0.4)), OLD),
    "skyrl/dppo_tv": (DPPO(delta_low=0.1, delta_high=0.15, cap=math.inf), MU),
    "skyrl/dppo_kl": (DPPO(divergence="kl", delta_low=0.02, delta_high=0.03, cap=math.inf), MU),
    "openrlhf/ppo": (PPOClip(**clip(0.2, 0.28)), MU),
    "openrlhf/ppo_sequence": (PPOClip(aggregation=SEQUENCE, **clip(0.2, 0.28)), MU),
    "openrlhf/dual_clip": (PPOClip(dual_clip=1.5), MU),
    "openrlhf/gspo": (GSPO(**clip(0.1, 0.1)), ROW),
    "openrlhf/correction_clip": (PPOClip(correction=Correction(method="truncate", low=0.8, high=1.2)), MU),
    "openrlhf/correction_mask": (PPOClip(correction=Correction(method="mask", low=0.8, high=1.2)), MU),
    "trl/grpo": (trl(SEQUENCE), ROW),
    "trl/bnpo": (trl(TOKENS), ROW),
    "trl/dapo": (trl(TOKENS), ROW),
    "trl/dr_grpo": (trl(CONSTANT), ROW),
    "trl/delta": (trl(TOKENS, clip_high=0.2, dual_clip=1.5), ROW),
    "trl/gspo": (GSPO(kl=K3, **clip(0.1, 0.1)), ROW),
    "trl/cispo": (CISPO(anchor="old", kl=K3, **clip(1.0, 0.4)), ROW),
    "areal/ppo": (PPOClip(**clip(0.2, 0.28)), OLD),
    "areal/dual_clip": (PPOClip(dual_clip=1.5), OLD),
    "areal/gspo": (GSPO(aggregation=TOKENS, **clip(0.1, 0.1)), ROW),
}
# SkyRL's loss is A rho M itself, with the gradient of ours, which is A sg(rho) M log pi.
ONLY_GRADIENTS = {"skyrl/dppo_tv", "skyrl/dppo_kl"}
VALUES = {"verl": TOKENS, "skyrl": SEQUENCE, "openrlhf": TOKENS, "areal": TOKENS}
MEANS = {
    "verl/token-mean": TOKENS,
    "verl/seq-mean-token-sum": ROWS,
    "verl/seq-mean-token-mean": SEQUENCE,
    "verl/seq-mean-token-sum-norm": CONSTANT,
}
KLS = [f"{peer}/{kind}" for peer in ("verl", "skyrl", "openrlhf") for kind in ("k1", "k2", "k3")] + ["verl/k3+"]


@pytest.fixture(scope="module")
def losses() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All of ours with their gradients, in one program."""

    def policy(name: str, given: Batch, now_BT: jax.Array) -> jax.Array:
        out = POLICIES[name][0](TokenStats(now_BT), given)
        return out.sum / out.weight

    def value(aggregation: Aggregation, given: Batch, value_BT: jax.Array) -> jax.Array:
        out = ValueLoss(clip=0.2, aggregation=aggregation)(value_BT[None], given)
        return out.sum / out.weight

    def mean(aggregation: Aggregation, now_BT: jax.Array) -> jax.Array:
        out = aggregation(now_BT, jnp.asarray(MASK))
        return out.sum / out.weight

    def run(given: dict[str, Batch], now_BT: jax.Array, value_BT: jax.Array, ref_BT: jax.Array):
        out = {name: jax.value_and_grad(lambda x, n=name: policy(n, given[n], x))(now_BT) for name in POLICIES}
        for name, how in VALUES.items():
            out[f"{name}/value"] = jax.value_and_grad(lambda x, how=how: value(how, given["verl/ppo"], x))(value_BT)
        for name, how in MEANS.items():
            out[name] = jax.value_and_grad(lambda x, how=how: mean(how, x))(now_BT)
        for name in KLS:
            kl, pull = jax.vjp(lambda x, n=name: kl_estimate(x, ref_BT, n.split("/")[1]), now_BT)
            out[name] = kl, pull(jnp.ones_like(kl))[0]
        return out

    given = {name: b for name, (_, b) in POLICIES.items()}
    return jax.device_get(
        jax.jit(run)(given, jnp.asarray(X["now"]), jnp.asarray(X["value_now"]), jnp.asarray(X["ref"]))
    )


@pytest.mark.parametrize("name", [*POLICIES, *(f"{peer}/value" for peer in VALUES), *MEANS, *KLS])
def test_losses(losses: dict[str, tuple[np.ndarray, np.ndarray]], name: str) -> None:
    value, gradient = losses[name]
    if name not in ONLY_GRADIENTS:
        close(value, PEERS[f"{name}/loss"])
    close(gradient, PEERS[f"{name}/gradient"])
    assert np.abs(gradient).max() > 1e-3


def test_all_that_was_written_down_is_compared() -> None:
    made = {name.rpartition("/")[0] for name in PEERS} - {"input"}
    apart = {"verl/grpo_alone", "verl/rloo_alone", "skyrl/reinforce_plus_plus"}
    assert made == {*ADVANTAGES, *POLICIES, *(f"{peer}/value" for peer in VALUES), *MEANS, *KLS} | apart
