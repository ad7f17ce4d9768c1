"""The same numbers as other libraries give on the same random inputs, where the rule is the same.

`tests/data/peers/peers.npz` has what verl, TRL, OpenRLHF, SkyRL and AReaL computed, in the versions of `versions.json`
beside it; `make_peers.py` made it by importing them. `checkouts.npz` has what NeMo-RL and slime computed, from files at
the commits in `versions.json`, by `make_checkouts.py`. Where a rule differs on purpose, the case says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.advantages import GAE, Group
from ppojax.component import Component
from ppojax.losses import CISPO, DPPO, GSPO, Aggregation, Correction, PPOClip, Reinforce
from ppojax.losses.kl import KLPenalty, kl_estimate
from ppojax.losses.policy import PolicyLoss
from ppojax.losses.value import ValueLoss
from ppojax.types import Advantage, Batch, Ending, Experience, TokenStats
from small_batch import experience_of

DATA = Path(__file__).parent / "data" / "peers"
PEERS = {**np.load(DATA / "peers.npz"), **np.load(DATA / "checkouts.npz")}
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
REWARDED, SCORED, PENALISED = experience(), experience(scores=True), experience(scores=True, kl=0.01)
ALONE = experience(scores=True, groups=[0, 0, 0, 1, 1, 2])
# With a baseline of the others NeMo-RL also divides by the deviation of the others, ours by that of all.
OTHERS = np.stack([np.delete(X["score"].reshape(2, 3), i, axis=1).std(1, ddof=1) for i in range(3)], axis=1)
DEVIATIONS = (X["score"].reshape(2, 3).std(1, ddof=1, keepdims=True) + 1e-6) / (OTHERS + 1e-6)
ADVANTAGES: dict[str, tuple[GAE | Group, Experience, float | np.ndarray]] = {
    # verl skips observations. Whitening cannot be turned off there.
    "verl/gae": (GAE(whiten="batch", whiten_floor=1e-4, **RATES), REWARDED, BESSEL),
    # SkyRL counts them as steps, with the critic's value.
    "skyrl/gae": (GAE(whiten="batch", whiten_floor=1e-4, mask_rule="dense", **RATES), REWARDED, BESSEL),
    # OpenRLHF counts them as steps, with value 0; it divides by n.
    "openrlhf/gae": (GAE(whiten="batch", whiten_floor=1e-4, mask_rule="zero", **RATES), PENALISED, 1.0),
    # AReaL skips observations and bootstraps a row that hit the limit.
    "areal/gae": (GAE(**RATES), experience(scores=True, cut=True), 1.0),
    "verl/grpo": (Group(), SCORED, 1.0),
    "verl/dr_grpo": (Group(scale="none"), SCORED, 1.0),
    "verl/rloo": (Group(baseline="leave_one_out", scale="none"), SCORED, 1.0),
    "verl/reinforce_plus_plus": (Group(baseline="none", rewards="to_go", **WHITE), REWARDED, BESSEL),
    "verl/reinforce_plus_plus_baseline": (Group(**WHITE), SCORED, BESSEL),
    "skyrl/grpo": (Group(), SCORED, 1.0),
    "skyrl/rloo": (Group(baseline="leave_one_out", scale="none"), SCORED, 1.0),
    "skyrl/rloo_alone": (Group(baseline="leave_one_out", scale="none"), ALONE, 1.0),
    "openrlhf/reinforce": (Group(baseline="none", rewards="to_go", **WHITE), PENALISED, 1.0),
    "openrlhf/rloo": (Group(baseline="leave_one_out", scale="none"), SCORED, 1.0),
    "openrlhf/reinforce_baseline": (Group(**WHITE), SCORED, 1.0),
    "openrlhf/group_norm": (Group(epsilon=1e-9), SCORED, 1.0),
    "openrlhf/dr_grpo": (Group(scale="none"), SCORED, 1.0),
    # NeMo-RL skips observations.
    "nemo_rl/gae": (GAE(**RATES), SCORED, 1.0),
    "nemo_rl/gae_by_length": (GAE(gamma=0.97, length_alpha=0.4, lambda_value=1.0), SCORED, 1.0),
    "nemo_rl/gae_monte_carlo": (GAE(lambda_policy=1.0), SCORED, 1.0),
    "nemo_rl/grpo": (Group(), SCORED, 1.0),
    "nemo_rl/rloo": (Group(baseline="leave_one_out", scale="none"), SCORED, 1.0),
    "nemo_rl/grpo_leave_one_out": (Group(baseline="leave_one_out"), SCORED, DEVIATIONS.reshape(B, 1)),
    "nemo_rl/grpo_alone": (Group(), ALONE, 1.0),
    "nemo_rl/reinforce_plus_plus": (Group(baseline="none", **WHITE), SCORED, 1.0),
    "nemo_rl/reinforce_plus_plus_baseline": (Group(**WHITE), SCORED, 1.0),
    # slime counts observations as steps, with the critic's value.
    "slime/gae": (GAE(mask_rule="dense", **RATES), SCORED, 1.0),
    "slime/grpo": (Group(), SCORED, 1.0),
    "slime/dr_grpo": (Group(scale="none"), SCORED, 1.0),
    "slime/reinforce_plus_plus": (Group(baseline="none", rewards="to_go", **WHITE), PENALISED, BESSEL),
    "slime/reinforce_plus_plus_baseline": (Group(**WHITE), SCORED, BESSEL),
}


def firsts(cases: Mapping[str, tuple[Component, tuple]]) -> dict[str, str]:
    """For each case the first one with the same settings and the same arrays."""
    seen: dict[tuple[str, int], str] = {}
    return {name: seen.setdefault((repr(rule), id(given)), name) for name, (rule, given) in cases.items()}


@pytest.fixture(scope="module")
def advantages() -> dict[str, Advantage]:
    """All of ours in one program, what several peers have once."""
    cases = {name: (rule, e) for name, (rule, e, _) in ADVANTAGES.items()}
    cases["to_go"] = Group(baseline="none", scale="none", rewards="to_go"), REWARDED
    first = firsts(cases)
    run = jax.jit(lambda given: {name: cases[name][0](e) for name, e in given.items()})
    ours = jax.device_get(run({name: cases[name][1] for name in set(first.values())}))
    return {name: ours[same] for name, same in first.items()}


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


def test_a_group_of_one_learns_nothing_here(advantages: dict[str, Advantage]) -> None:
    """verl 0.9.1 takes mean 0 and deviation 1 for it, so that its whole score is its advantage; ours is 0."""
    score = X["score"][5] * MASK[5]
    for name, case in (("grpo", "nemo_rl/grpo_alone"), ("rloo", "skyrl/rloo_alone")):
        ours = advantages[case].advantage_BT[:, :T]
        theirs = PEERS[f"verl/{name}_alone/advantage"]
        close(ours[:5], theirs[:5])
        close(theirs[5], score)
        np.testing.assert_array_equal(ours[5], 0)


def test_rewards_pass_observations_here(advantages: dict[str, Advantage]) -> None:
    """SkyRL 0.3.0 starts REINFORCE++ anew at each observation, so that what follows one does not count before it."""
    theirs = PEERS["skyrl/reinforce_plus_plus/returns"]
    ours = advantages["to_go"].advantage_BT[:, :T]
    observed = (np.arange(T)[None] < X["length"][:, None]) & ~MASK
    behind = observed[:, ::-1].cumsum(1)[:, ::-1] == 0
    close(ours[behind & MASK], theirs[behind & MASK])
    assert not np.allclose(ours[MASK], theirs[MASK], atol=0.1)
    close(ours, PEERS["verl/reinforce_plus_plus/returns"])


@pytest.mark.parametrize("peer", ["nemo_rl", "slime"])
def test_whitening_elsewhere(peer: str) -> None:
    """NeMo-RL whitens GAE unless told not to, slime when asked; as verl, by n - 1."""
    plain = PEERS[f"{peer}/gae/advantage"]
    white = (plain - plain[MASK].mean()) / plain[MASK].std(ddof=1) * MASK
    close(PEERS[f"{peer}/gae_whitened/advantage"], white)


def test_a_kl_in_the_reward_counts_for_earlier_tokens_here() -> None:
    """NeMo-RL takes the KL of a token off that token's advantage alone; REINFORCE++, and ours, off its returns."""
    raw = X["score"][:, None] - 0.05 * (X["old"] - X["ref"])
    theirs = PEERS["nemo_rl/reinforce_plus_plus_kl/advantage"]
    close(theirs, (raw - raw[MASK].mean()) / raw[MASK].std() * MASK)


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


def corrected(method: str, **kwargs: str | float) -> PPOClip:
    return PPOClip(correction=Correction(method=method, **kwargs))


TOKENS, K3 = Aggregation(), KLPenalty(coefficient=0.05, estimator="k3", importance_cap=None)
OLD, ROW, MU = batch(), batch(rows=True), batch(behavior="behavior")
MU_ROW = batch(behavior="behavior", rows=True)
WEIGHTS, BAND = {"method": "truncate", "high": math.inf}, {"low": 0.8, "high": 1.2}
NARROW = {"level": "geometric", "low": 0.98, "high": 1.02}
# NeMo-RL and slime put the weight's own gradient into a weighted k3, which then is k2's: our k3+.
UNWEIGHTED = KLPenalty(coefficient=0.05, estimator="k3+", importance_cap=None)
WEIGHTED = KLPenalty(coefficient=0.05, estimator="k3+", importance_cap=math.inf)
POLICIES: dict[str, tuple[PolicyLoss, Batch]] = {
    "verl/ppo": (PPOClip(**clip(0.2, 0.28)), OLD),
    "verl/dual_clip": (PPOClip(dual_clip=1.5), OLD),
    "verl/dppo_tv": (DPPO(delta_low=0.1, delta_high=0.15, cap=1.7), OLD),
    "verl/dppo_kl": (DPPO(divergence="kl", delta_low=0.02, delta_high=0.03, cap=1.7), OLD),
    "verl/tis_token": (corrected("truncate", high=1.2), MU),
    "verl/tis_sequence": (corrected("truncate", level="sequence", high=1.2), MU),
    "verl/icepop_token": (corrected("mask", **BAND), MU),
    "verl/icepop_sequence": (corrected("mask", level="sequence", **BAND), MU),
    "verl/rejection": (corrected("mask", weight="one", **NARROW), MU),
    "verl/gspo": (GSPO(**clip(0.1, 0.1)), OLD),
    "verl/cispo": (CISPO(anchor="old", **clip(0.3, 0.4)), OLD),
    "skyrl/ppo_token_mean": (PPOClip(**clip(0.2, 0.28)), OLD),
    "skyrl/ppo_sequence_mean": (PPOClip(aggregation=SEQUENCE, **clip(0.2, 0.28)), OLD),
    "skyrl/ppo_seq_mean_token_sum_norm": (PPOClip(aggregation=CONSTANT, **clip(0.2, 0.28)), OLD),
    "skyrl/dual_clip": (PPOClip(dual_clip=1.5, **clip(0.2, 0.28)), OLD),
    "skyrl/gspo": (GSPO(**clip(0.1, 0.1)), OLD),
    "skyrl/cispo": (CISPO(anchor="old", **clip(0.3, 0.4)), OLD),
    "skyrl/correction_tis_token": (corrected("truncate", high=1.2), MU),
    "skyrl/correction_tis_sequence": (corrected("truncate", level="sequence", high=1.2), MU),
    "skyrl/correction_geometric": (corrected("mask", weight="one", **NARROW), MU),
    "skyrl/correction_geometric_tis": (corrected("mask", weight="token", **NARROW), MU),
    "skyrl/correction_product": (corrected("mask", level="sequence", weight="one", low=0.8, high=1.25), MU),
    "skyrl/dppo_tv": (DPPO(delta_low=0.1, delta_high=0.15, cap=math.inf), MU),
    "skyrl/dppo_kl": (DPPO(divergence="kl", delta_low=0.02, delta_high=0.03, cap=math.inf), MU),
    "openrlhf/ppo": (PPOClip(**clip(0.2, 0.28)), MU),
    "openrlhf/ppo_sequence": (PPOClip(aggregation=SEQUENCE, **clip(0.2, 0.28)), MU),
    "openrlhf/dual_clip": (PPOClip(dual_clip=1.5), MU),
    "openrlhf/gspo": (GSPO(**clip(0.1, 0.1)), ROW),
    "openrlhf/correction_clip": (corrected("truncate", **BAND), MU),
    "openrlhf/correction_mask": (corrected("mask", **BAND), MU),
    "openrlhf/correction_rows": (corrected("mask", weight="token", **NARROW), MU),
    "trl/grpo": (trl(SEQUENCE), ROW),
    "trl/bnpo": (trl(TOKENS), ROW),
    "trl/dapo": (trl(TOKENS), ROW),
    "trl/dr_grpo": (trl(CONSTANT), ROW),
    "trl/delta": (trl(TOKENS, clip_high=0.2, dual_clip=1.5), ROW),
    "trl/gspo": (GSPO(kl=K3, **clip(0.1, 0.1)), ROW),
    "trl/cispo": (CISPO(anchor="old", kl=K3, **clip(1.0, 0.4)), ROW),
    "areal/ppo": (PPOClip(**clip(0.2, 0.28)), OLD),
    "areal/dual_clip": (PPOClip(dual_clip=1.5), OLD),
    "areal/decoupled": (corrected("truncate", high=math.inf), MU),
    "areal/correction_tis": (corrected("truncate", **BAND), MU),
    "areal/correction_icepop": (corrected("mask", **BAND), MU),
    "areal/correction_tis_rows": (corrected("truncate", **NARROW), MU),
    "areal/correction_mask_rows": (corrected("mask", **NARROW), MU),
    "areal/gspo": (GSPO(aggregation=TOKENS, **clip(0.1, 0.1)), ROW),
    "nemo_rl/ppo": (PPOClip(**clip(0.2, 0.28)), OLD),
    "nemo_rl/ppo_sequence": (PPOClip(aggregation=SEQUENCE, **clip(0.2, 0.28)), OLD),
    "nemo_rl/dual_clip": (PPOClip(dual_clip=1.5), OLD),
    "nemo_rl/reinforce": (Reinforce(importance_weight=False), OLD),
    "nemo_rl/gspo": (GSPO(**clip(0.1, 0.1)), ROW),
    "nemo_rl/gspo_corrected": (GSPO(correction=Correction(level="sequence", **WEIGHTS), **clip(0.1, 0.1)), MU_ROW),
    "nemo_rl/cispo": (CISPO(anchor="old", **clip(0.3, 0.4)), OLD),
    "nemo_rl/correction": (corrected("truncate", high=math.inf), MU),
    "nemo_rl/correction_tis": (corrected("truncate", **BAND), MU),
    "nemo_rl/correction_icepop": (corrected("mask", **BAND), MU),
    "nemo_rl/correction_rows": (corrected("mask", weight="token", **NARROW), MU),
    "nemo_rl/kl": (PPOClip(kl=UNWEIGHTED), OLD),
    "nemo_rl/kl_weighted": (PPOClip(kl=WEIGHTED), MU),
    "nemo_rl/positive_nll": (PPOClip(positive_nll=0.1), OLD._replace(score_B=jnp.asarray(X["score"]))),
    "slime/ppo": (PPOClip(aggregation=SEQUENCE, **clip(0.2, 0.28)), OLD),
    "slime/ppo_token": (PPOClip(**clip(0.2, 0.28)), OLD),
    "slime/ppo_behavior": (PPOClip(anchor="behavior", aggregation=SEQUENCE, **clip(0.2, 0.28)), MU),
    "slime/dual_clip": (PPOClip(dual_clip=1.5, aggregation=SEQUENCE), OLD),
    "slime/gspo": (GSPO(**clip(0.1, 0.1)), ROW),
    "slime/cispo": (CISPO(anchor="old", aggregation=SEQUENCE, **clip(0.3, 0.4)), OLD),
    "slime/correction_tis": (
        PPOClip(correction=Correction(method="truncate", **BAND), aggregation=SEQUENCE, **clip(0.2, 0.28)),
        MU,
    ),
    "slime/correction_icepop": (
        PPOClip(correction=Correction(method="mask", **BAND), aggregation=SEQUENCE, **clip(0.2, 0.28)),
        MU,
    ),
    "slime/kl": (PPOClip(aggregation=SEQUENCE, kl=K3, **clip(0.2, 0.28)), OLD),
    "slime/kl_weighted": (PPOClip(aggregation=SEQUENCE, kl=WEIGHTED, **clip(0.2, 0.28)), OLD),
}
# SkyRL's loss is A rho M itself, with the gradient of ours, which is A sg(rho) M log pi.
ONLY_GRADIENTS = {"skyrl/dppo_tv", "skyrl/dppo_kl"}
VALUES = {
    "verl": TOKENS,
    "skyrl": SEQUENCE,
    "openrlhf": TOKENS,
    "areal": TOKENS,
    "nemo_rl": TOKENS,
    "slime": SEQUENCE,
}
IN_BAND = np.abs(np.exp(np.where(MASK, X["old"] - X["behavior"], 0).sum(1) / MASK.sum(1)) - 1) <= 0.02
# slime's squares are whole, not halves. What verl rejects does not count in its means either.
TIMES = {"slime/value": 2.0, "verl/rejection": float(N / MASK[IN_BAND].sum())}
MEANS = {
    "verl/token-mean": TOKENS,
    "verl/seq-mean-token-sum": ROWS,
    "verl/seq-mean-token-mean": SEQUENCE,
    "verl/seq-mean-token-sum-norm": CONSTANT,
}
WITH_KLS = ("verl", "skyrl", "openrlhf", "nemo_rl", "slime")
KLS = [f"{peer}/{kind}" for peer in WITH_KLS for kind in ("k1", "k2", "k3")] + ["verl/k3+"]


@pytest.fixture(scope="module")
def losses() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All of ours with their gradients in one program, what several peers have once."""
    first = firsts(POLICIES) | {f"{peer}/value": f"value/{how.mode}" for peer, how in VALUES.items()}
    first |= {name: name for name in MEANS} | {name: name.split("/")[1] for name in KLS}

    def policy(name: str, given: Batch, now_BT: jax.Array) -> jax.Array:
        loss = POLICIES[name][0]
        out = loss(TokenStats(now_BT), loss.of_minibatch(given))
        return out.sum / out.weight

    def value(aggregation: Aggregation, given: Batch, value_BT: jax.Array) -> jax.Array:
        out = ValueLoss(clip=0.2, aggregation=aggregation)(value_BT[None], given)
        return out.sum / out.weight

    def mean(aggregation: Aggregation, now_BT: jax.Array) -> jax.Array:
        out = aggregation(now_BT, jnp.asarray(MASK))
        return out.sum / out.weight

    def run(given: dict[str, Batch], now_BT: jax.Array, value_BT: jax.Array, ref_BT: jax.Array):
        out = {name: jax.value_and_grad(lambda x, n=name: policy(n, given[n], x))(now_BT) for name in given}
        for how in (TOKENS, SEQUENCE):
            loss = partial(value, how, given["verl/ppo"])
            out[f"value/{how.mode}"] = jax.value_and_grad(loss)(value_BT)
        for name, how in MEANS.items():
            out[name] = jax.value_and_grad(lambda x, how=how: mean(how, x))(now_BT)
        for kind in ("k1", "k2", "k3", "k3+"):
            kl, pull = jax.vjp(lambda x, kind=kind: kl_estimate(x, ref_BT, kind), now_BT)
            out[kind] = kl, pull(jnp.ones_like(kl))[0]
        return out

    given = {name: POLICIES[name][1] for name in set(first.values()) & set(POLICIES)}
    arrays = (jnp.asarray(X[name]) for name in ("now", "value_now", "ref"))
    ours = jax.device_get(jax.jit(run)(given, *arrays))
    return {name: ours[same] for name, same in first.items()}


@pytest.mark.parametrize("name", [*POLICIES, *(f"{peer}/value" for peer in VALUES), *MEANS, *KLS])
def test_losses(losses: dict[str, tuple[np.ndarray, np.ndarray]], name: str) -> None:
    value, gradient = (TIMES.get(name, 1.0) * x for x in losses[name])
    if name not in ONLY_GRADIENTS:
        close(value, PEERS[f"{name}/loss"])
    close(gradient, PEERS[f"{name}/gradient"])
    assert np.abs(gradient).max() > 1e-3


def test_all_that_was_written_down_is_compared() -> None:
    made = {name.rpartition("/")[0] for name in PEERS} - {"input"}
    apart = {"verl/grpo_alone", "verl/rloo_alone", "skyrl/reinforce_plus_plus"}
    apart |= {"nemo_rl/gae_whitened", "slime/gae_whitened", "nemo_rl/reinforce_plus_plus_kl"}
    assert made == {*ADVANTAGES, *POLICIES, *(f"{peer}/value" for peer in VALUES), *MEANS, *KLS} | apart
