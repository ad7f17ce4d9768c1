"""A step is the same step, however its rows are cut up, padded, ordered and laid over devices.

Gradients are float32 sums of some hundred terms in another order. With eps = 1 the first AdamW update is
lr g / (|g| + 1), smooth in the gradient, so that parameters are compared as gradients are: to 2e-5 of the largest.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from random_batch import meshes_of, minibatch, minibatch_rows

import policy_losses
from helpers import ACTOR, CRITIC, params
from ppojax.losses import CPPO, DPPO, DRPO, IPO, KLPenalty, PPOClip, ValueLoss
from ppojax.mesh import MeshConfig
from ppojax.models.forward import score_tokens
from ppojax.types import Batch, Ending, Layout, TokenTrace
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.settings import CriticConfig, OptimizerConfig
from ppojax.update.state import init_state

OPTIMIZER = OptimizerConfig(learning_rate=1.0, eps=1.0, max_grad_norm=1e6)
CRITIC_CONFIG = CriticConfig(optimizer=OPTIMIZER, loss=ValueLoss(clip=0.3))
# The policy is fresh, so that no token's probability is far from 1/48.
NEAR = {
    "ipo": IPO(delta=4e-3),
    "drpo": DRPO(delta=4e-3),
    "cppo": CPPO(delta=4e-3, budget=1e-3),
    "entropy and kl": DPPO(delta_low=4e-3, kl=KLPenalty(coefficient=0.3, estimator="k1")),
}
LOSSES = {
    **(policy_losses.LOSSES | policy_losses.MORE | NEAR),
    "dppo": DPPO(entropy_coefficient=0.01, delta_low=4e-3, delta_high=2e-3),
    "ppo": PPOClip(),
}
KINDS = ("dppo", "ppo", "critic")


class Stepped(NamedTuple):
    """What one step moves each parameter by, its metrics, and what the actor's says of each token."""

    moved: Any
    metrics: dict[str, float]
    trace: TokenTrace | None = None


def step(kind: str, batch: Batch, layout: Layout, microbatch_rows: int, mesh: MeshConfig | None = None) -> Stepped:
    built, trace = (mesh or MeshConfig()).build(), None
    if kind == "critic":
        start = params(CRITIC)
        given = init_state(CRITIC, start, CRITIC_CONFIG.build_optimizer(), built)
        state, metrics = critic_step(
            given, batch, model=CRITIC, config=CRITIC_CONFIG, layout=layout, microbatch_rows=microbatch_rows, mesh=built
        )
    else:
        actor, start = replace(ACTOR, mesh=built), params(ACTOR)
        given = init_state(actor, start, OPTIMIZER.build(), built)
        state, metrics, trace = actor_step(
            given, batch, model=actor, loss=LOSSES[kind], optimizer=OPTIMIZER, temperature=0.9, layout=layout,
            microbatch_rows=microbatch_rows, mesh=built,
        )  # fmt: skip
    assert all(x.is_deleted() for x in jax.tree.leaves(given)), "the step takes the state's memory over"
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, start)
    return Stepped(moved, {name: float(value) for name, value in metrics.items()}, jax.device_get(trace))


@lru_cache
def reference(kind: str) -> Stepped:
    """All rows at once on one device, with separate prompts."""
    batch, layout = minibatch()
    return step(kind, batch, layout, 8)


def assert_same(got: Stepped, kind: str) -> None:
    moved, metrics, _ = got
    want_moved, want_metrics, _ = reference(kind)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want_moved))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(want_moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * largest)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(want_metrics[name], rel=2e-5, abs=1e-6), name


def test_the_reference_is_worth_comparing_with() -> None:
    """Some tokens are outside of the trust region, some clipped, and nothing is zero by accident."""
    assert 0 < reference("dppo").metrics["trust_region/masked_frac_pos"] < 1
    assert 0 < reference("dppo").metrics["trust_region/masked_frac_neg"] < 1
    assert 0 < reference("ppo").metrics["actor/pg_clipfrac"] < 1
    assert 0 < reference("critic").metrics["critic/vf_clipfrac"] < 1


def test_the_trace_of_tokens_against_a_loop() -> None:
    """The ratio to the sampler, and no gradient where DPPO masks, PPO clips, A is 0, or nothing was chosen."""
    batch, layout = minibatch()
    e = batch.experience
    score = jax.jit(partial(score_tokens, ACTOR, layout=layout, temperature=0.9))
    logp_BT = np.asarray(score(params(ACTOR), e).logp)
    batch, e = jax.device_get((batch, e))
    dppo, ppo = reference("dppo").trace, reference("ppo").trace
    assert dppo is not None and ppo is not None
    # The failed row has advantages, but no token that counts.
    assert not dppo.mask_BT[-1].any() and not dppo.ratio_BT[-1].any() and np.asarray(batch.advantage_BT)[:-1].any()
    held = clipped = 0
    for b, t in np.ndindex(*logp_BT.shape):
        if not e.action_BT[b, t]:
            assert dppo.ratio_BT[b, t] == ppo.ratio_BT[b, t] == 0 and not dppo.mask_BT[b, t] and not ppo.mask_BT[b, t]
            continue
        a, mu, pi = float(batch.advantage_BT[b, t]), np.exp(e.logp_behavior_BT[b, t]), np.exp(logp_BT[b, t])
        assert dppo.ratio_BT[b, t] == pytest.approx(pi / mu, rel=1e-5)
        assert ppo.ratio_BT[b, t] == pytest.approx(pi / mu, rel=1e-5)
        outside = abs(mu - pi) > (2e-3 if a > 0 else 4e-3) and (pi - mu) * a > 0
        assert e.logp_old_BT is not None
        ratio = pi / np.exp(e.logp_old_BT[b, t])
        clip = ratio > 1.2 if a > 0 else ratio < 0.8
        assert dppo.mask_BT[b, t] == (not outside) and ppo.mask_BT[b, t] == (not clip), (b, t)
        held, clipped = held + outside, clipped + bool(clip)
    assert held > 2 and clipped > 2


def test_recording_tokens_changes_no_bit_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step, compiled with nothing recorded.

    As users compile it: with the older emitters, which the tests use to save time, last bits depend on what is fused.
    """
    options = {"xla_cpu_use_fusion_emitters": True} if version("jaxlib").startswith("0.10.") else {}
    batch, layout = minibatch()
    built = MeshConfig().build()
    actor = replace(ACTOR, mesh=built)

    def updated() -> tuple[Any, TokenTrace]:
        plain = partial(
            inspect.unwrap(actor_step), model=actor, loss=LOSSES["dppo"], optimizer=OPTIMIZER, temperature=0.9,
            layout=layout, microbatch_rows=8, mesh=built,
        )  # fmt: skip
        run = jax.jit(plain, donate_argnums=0, compiler_options=options)
        state, _, trace = run(init_state(actor, params(ACTOR), OPTIMIZER.build(), built), batch)
        return state, trace

    recorded, trace = updated()
    assert trace.mask_BT.any()
    monkeypatch.setattr("ppojax.update.actor.trace_tokens", lambda loss, stats, rows: TokenTrace(None, None))
    alone, nothing = updated()
    assert nothing == TokenTrace(None, None)
    jax.tree.map(np.testing.assert_array_equal, recorded, alone)


def cases(chosen: dict[str, tuple[str, ...]]) -> list[Any]:
    """Every case with every kind of step; those not chosen are slow, for each is a program to compile."""
    return [
        pytest.param(case, kind, id=f"{case}-{kind}", marks=() if kind in kinds else pytest.mark.slow)
        for case, kinds in chosen.items()
        for kind in KINDS
    ]


MICROBATCHES = {"1": (1, False), "2 shared": (2, True), "4": (4, False), "8 shared": (8, True)}


@pytest.mark.parametrize(("case", "kind"), cases({"1": (), "2 shared": ("dppo", "critic"), "4": (), "8 shared": ()}))
def test_microbatches_and_shared_prompts_change_nothing(case: str, kind: str) -> None:
    microbatch_rows, share = MICROBATCHES[case]
    batch, layout = minibatch(share=share)
    assert (layout.group == 2) == share
    got, want = step(kind, batch, layout, microbatch_rows), reference(kind)
    assert_same(got, kind)
    if got.trace is not None and want.trace is not None:
        np.testing.assert_array_equal(got.trace.mask_BT, want.trace.mask_BT)
        np.testing.assert_allclose(got.trace.ratio_BT, want.trace.ratio_BT, rtol=1e-5)


# Every mesh of 8 devices over which 4 heads can be split.
DEFAULT = {"2x2x1x2": ("dppo",), "1x4x2x1": ("critic",), "2x1x1x4": ("dppo",)}


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        pytest.param(m, kind, id=f"{name}-{kind}", marks=() if kind in DEFAULT.get(name, ()) else pytest.mark.slow)
        for name, m in meshes_of(8, tensor=4).items()
        for kind in ("dppo", "critic")
    ],
)
def test_meshes_change_nothing(mesh: MeshConfig, kind: str) -> None:
    share = mesh.row_shards < 8
    batch, layout = minibatch(mesh, share)
    assert_same(step(kind, batch, layout, 4 if mesh.row_shards < 4 else 8, mesh), kind)


def test_groups_that_do_not_split_over_the_devices_are_refused() -> None:
    mesh = MeshConfig(data=4, tensor=2)
    batch, layout = minibatch(mesh, share=True)
    with pytest.raises(AssertionError, match="2 groups do not split over 4 devices"):
        step("dppo", batch, layout, 4, mesh)


@pytest.mark.parametrize("kind", ["dppo", "critic"])
def test_padding_order_and_empty_rows_change_nothing(kind: str) -> None:
    rows = minibatch_rows()
    order = np.random.default_rng(1).permutation(8)
    batch, layout = minibatch(rows=[rows[i] for i in order], batch=12, bucket=16)
    assert_same(step(kind, batch, layout, 4), kind)


@pytest.mark.parametrize("kind", ["dppo", "critic"])
def test_a_failed_row_might_as_well_not_be_there(kind: str) -> None:
    rows = minibatch_rows()
    assert rows[-1].ending == Ending.ERROR
    nonsense = replace(rows[-1], token=rows[-1].token[::-1], logp_behavior=rows[-1].logp_behavior - 50)
    batch, layout = minibatch(rows=[*rows[:-1], nonsense])
    assert_same(step(kind, batch, layout, 8), kind)


# These compare with what the sampler did not record here; in parts they are tested without a model.
RECORDED = {"dppo topk", "dppo full"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(LOSSES.keys() - RECORDED - {"dppo", "ppo"}))
def test_every_loss_is_the_same_in_parts_and_on_a_mesh(kind: str) -> None:
    mesh = MeshConfig(data=2, tensor=4)
    batch, layout = minibatch(mesh, share=True)
    assert_same(step(kind, batch, layout, 4, mesh), kind)
