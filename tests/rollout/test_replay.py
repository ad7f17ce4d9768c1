"""The sampler's choice of experts: recorded for every token, carried to the trainer, and replayed there (R3)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_model import SPECS, drawn
from ppojax.experience.minibatch import split_rows
from ppojax.experience.pack import layout_of, pack
from ppojax.mesh import MeshConfig
from ppojax.models import forward
from ppojax.models.forward import ModelDef, Params, hidden_states, positions
from ppojax.models.spec import DecoderSpec, MoESpec
from ppojax.rollout.collect import Collector
from ppojax.rollout.sampler import SamplerDef
from ppojax.types import Experience, Layout, Row
from tiny_model import TOKENIZER, VOCAB, Scripted, scripted_task, stops

MESH = MeshConfig().build()
TASKS = [scripted_task("ab", ("c", 0.0), ("", 1.0)), scripted_task("cdef01", ("0123", 0.0), ("", 0.0))]
score = jax.jit(forward.score_tokens, static_argnames=("model", "layout", "temperature"))


def sampled(spec: DecoderSpec, params: Params, *, record: bool = True, dtype: str = "float32") -> tuple[Row, ...]:
    """Two tasks, two episodes of two turns each."""
    sampler = SamplerDef(ModelDef(spec, dtype, remat="none"), MESH, positions=64, turn_tokens=12, record_experts=record)
    collect = Collector(Scripted(), TOKENIZER, sampler, stops(eos=()), group_size=2, bucket=8, slots=4)
    return collect(params, TASKS, jax.random.key(0)).rows


def packed(rows: tuple[Row, ...], share: bool) -> tuple[Experience, Layout]:
    layout = layout_of(rows, group=2 if share else 1, prompt_bucket=4)
    return pack(rows, batch=len(rows), bucket=8, actions=24, mesh=MESH, layout=layout), layout


def tiny(family: str) -> DecoderSpec:
    return SPECS[family].model_copy(update={"vocab": VOCAB})


@lru_cache
def family_rows(family: str) -> tuple[Row, ...]:
    return sampled(tiny(family), drawn(tiny(family)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_record_is_what_the_full_pass_chooses(family: str) -> None:
    """Prefill, two turns and an observation between them: each token's experts, of every layer that has some."""
    spec, rows = tiny(family), family_rows(family)
    assert spec.moe is not None
    experience, _ = packed(rows, share=False)
    free = jax.jit(lambda t: hidden_states(ModelDef(spec), drawn(spec), t, positions(t)).routing)(experience.token_BT)
    assert free is not None
    for b, row in enumerate(rows):
        assert row.routed is not None and row.routed.dtype == np.int16
        assert row.routed.shape == (len(row.token), spec.moe_layers, spec.moe.chosen)
        full_TLK = np.moveaxis(np.asarray(free.expert_NK[:, b, : len(row.token)]), 0, 1)
        np.testing.assert_array_equal(np.sort(row.routed), np.sort(full_TLK))
    first, second = rows[0].routed, rows[1].routed
    assert first is not None and second is not None
    n = int(rows[0].action.argmax())
    np.testing.assert_array_equal(first[:n], second[:n])  # the prompt of a group is read once


def test_the_record_survives_packing() -> None:
    rows = family_rows("qwen3_moe")
    bare = replace(rows[2], routed=None)
    experience, layout = packed((*rows[:2], bare, rows[3]), share=True)
    experience = jax.device_get(experience)
    assert layout.group == 2 and experience.routed_BTLK is not None and experience.routed_BTLK.dtype == jnp.int16
    for b, row in enumerate(rows):
        got = np.asarray(experience.routed_BTLK[b])
        n = 0 if b == 2 else len(row.token)
        np.testing.assert_array_equal(got[:n], np.zeros((0, 2, 2)) if b == 2 else row.routed)
        assert (got[n:] == -1).all()
    parts = jax.jit(split_rows, static_argnums=(1, 2))(experience, 2, 2)
    np.testing.assert_array_equal(parts.routed_BTLK[1], experience.routed_BTLK[2:])
    assert packed(tuple(replace(row, routed=None) for row in rows), share=True)[0].routed_BTLK is None


def test_dense_models_and_unasked_samplers_record_nothing() -> None:
    spec = tiny("qwen3_moe")
    assert all(row.routed is None for row in sampled(spec, drawn(spec), record=False))


@pytest.mark.parametrize("share", [False, True])
def test_a_replayed_record_is_where_tokens_go(share: bool) -> None:
    """With the record reversed among the experts, scores change; with the sampler's own they are the sampler's."""
    spec, rows = tiny("qwen3_moe"), family_rows("qwen3_moe")
    model, params = ModelDef(spec), drawn(spec)
    experience, layout = packed(rows, share)
    assert experience.routed_BTLK is not None

    def gap(e: Experience) -> float:
        logp_BT = score(model, params, e, layout, temperature=1.0).logp
        return float(jnp.abs(jnp.where(e.action_BT, logp_BT - e.logp_behavior_BT, 0)).max())

    assert gap(experience) < 2e-5
    assert gap(experience._replace(routed_BTLK=None)) < 2e-5  # in float32 and with equal weights nothing is near a tie
    other = jnp.where(experience.routed_BTLK >= 0, 7 - experience.routed_BTLK, -1)
    plain, plain_layout = packed(rows, share=False)
    assert gap(experience._replace(routed_BTLK=other)) > 0.01
    # The packed layout replays what the plain one does.
    plain = plain._replace(routed_BTLK=jnp.where(plain.routed_BTLK >= 0, 7 - plain.routed_BTLK, -1))
    want = score(model, params, plain, plain_layout, temperature=1.0).logp
    got = score(model, params, experience._replace(routed_BTLK=other), layout, temperature=1.0).logp
    T = min(got.shape[1], want.shape[1])
    np.testing.assert_allclose(got[:, :T], want[:, :T], rtol=1e-4, atol=1e-4)


def gaps(spec: DecoderSpec, params: Params, rows: tuple[Row, ...]) -> np.ndarray:
    """|logp difference| of a bfloat16 sampler and a float32 trainer, at each token that was sampled."""
    experience, layout = packed(rows, share=True)
    logp_BT = score(ModelDef(spec), params, experience, layout, temperature=1.0).logp
    return np.abs(np.asarray(logp_BT - experience.logp_behavior_BT))[np.asarray(experience.action_BT)]


@pytest.mark.slow
def test_replay_brings_the_mismatch_to_that_of_a_dense_model() -> None:
    """Two of 32 experts of width 16 against an MLP of width 32; 96 tokens of each of 12 seeds (docs/log.md)."""
    shape: dict[str, Any] = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 4, "head_width": 8, "vocab": VOCAB}
    dense = DecoderSpec(**shape, ffn=32)
    experts = DecoderSpec(**shape, ffn=32, moe=MoESpec(experts=32, chosen=2, ffn=16))
    plain, free, replayed = [], [], []
    for seed in range(12):
        params = drawn(dense, seed=seed)
        plain.append(gaps(dense, params, sampled(dense, params, record=False, dtype="bfloat16")))
        params = drawn(experts, seed=seed)
        rows = sampled(experts, params, dtype="bfloat16")
        free.append(gaps(experts, params, tuple(replace(row, routed=None) for row in rows)))
        replayed.append(gaps(experts, params, rows))
    plain_N, free_N, replayed_N = map(np.concatenate, (plain, free, replayed))
    assert replayed_N.mean() < 1.5 * plain_N.mean() and replayed_N.max() < 2 * plain_N.max()
    assert free_N.mean() > 2 * replayed_N.mean() and free_N.max() > 3 * replayed_N.max()
