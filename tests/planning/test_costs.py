from __future__ import annotations

import math

import jax
import pytest

from ppojax.errors import ConfigError
from ppojax.mesh import MeshConfig
from ppojax.models.forward import ModelDef, abstract_params, param_shardings
from ppojax.models.lora import LoRAConfig
from ppojax.models.spec import DecoderSpec, MoESpec
from ppojax.models.value_head import LinearHead
from ppojax.planning.costs import Work, forward_flops, link_of, mfu, seconds, sending
from ppojax.planning.models import models_of, weights_of
from ppojax.planning.shapes import SHAPES, shape_of
from ppojax.planning.targets import CHIPS, parse_target
from ppojax.planning.workload import workload_of
from tiny_config import tiny

SPEC = DecoderSpec(layers=2, width=8, heads=2, kv_heads=2, head_width=4, ffn=16, vocab=32)
H200 = CHIPS["h200"]


def test_forward_flops_by_hand() -> None:
    """2 a weight of q, k, v, o (8x8 each) and of three 8x16 matrices; 4 F a pair and head; 2 V D a scored token."""
    weights = 2 * (4 * 64 + 3 * 128 + 2 * 8)  # norms, which `update_flops` counts too
    expected = 2 * (10 * weights + 3 * 32 * 8) + 4 * 4 * 2 * 2 * 100
    assert forward_flops(SPEC, 10, 100, 3) == expected


def test_time_is_the_slower_of_computing_and_reading_and_then_sending() -> None:
    target, mesh = parse_target("h200:2x8"), MeshConfig(data=2, fsdp=8)
    assert seconds(Work(0.6 * 989e12, 0.1 * 4.8e12, {}), target, mesh) == pytest.approx(1.0)
    assert seconds(Work(0.1 * 989e12, 0.8 * 4.8e12, {}), target, mesh) == pytest.approx(1.0)
    sent = {("fsdp",): 0.8 * 450e9, ("data", "fsdp"): 0.8 * 50e9}
    assert sending(sent, target, mesh) == pytest.approx(2.0)
    assert seconds(Work(0.0, 0.0, sent), target, mesh) == pytest.approx(2.0)


def test_which_link_an_axis_uses() -> None:
    target, mesh = parse_target("h200:8x8"), MeshConfig(data=4, fsdp=8, tensor=2)
    assert link_of(("tensor",), target, mesh) == H200.link
    assert link_of(("fsdp",), target, mesh) == link_of(("data",), target, mesh) == link_of(("?",), target, mesh) == 50e9
    assert link_of(("fsdp",), target, MeshConfig(data=16, fsdp=4)) == H200.link
    assert link_of(("data",), parse_target("v5e:2x4"), MeshConfig(data=8)) == CHIPS["v5e"].link


def test_mfu() -> None:
    assert mfu(8 * 989e12 * 0.4, 1.0, 8, H200) == pytest.approx(0.4)


@pytest.mark.parametrize(
    "model",
    [
        ModelDef(SPEC, head=LinearHead(), count=3),
        ModelDef(SPEC.model_copy(update={"tied": False, "qk_norm": True}), lora=LoRAConfig(rank=2)),
        ModelDef(SPEC.model_copy(update={"moe": MoESpec(experts=4, chosen=2, ffn=8, shared_ffn=8, dense_first=1)})),
    ],
)
def test_weights_are_those_of_the_model(model: ModelDef) -> None:
    config = MeshConfig(fsdp=2, expert=2, tensor=2)
    mesh, one = config.build(), model.member
    shapes, places = jax.tree.leaves(abstract_params(one)), jax.tree.leaves(param_shardings(one, mesh))
    held = sum(math.prod(p.shard_shape(s.shape)) for s, p in zip(shapes, places, strict=True))
    assert weights_of(one).all == sum(math.prod(s.shape) for s in shapes)
    assert weights_of(one, config).all == held
    assert weights_of(model).trained == model.count * weights_of(one).trained


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-1.5B", 1.544),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-8B", 8.191),
        ("Qwen/Qwen3-30B-A3B", 30.53),
    ],
)
def test_published_shapes_have_their_published_sizes(name: str, billions: float) -> None:
    assert weights_of(ModelDef(shape_of(name, "model.path"))).all / 1e9 == pytest.approx(billions, abs=0.005)


def test_an_unknown_shape_is_not_downloaded() -> None:
    with pytest.raises(ConfigError, match=r"critic\.model\.path=some/model: the planner downloads nothing"):
        shape_of("some/model", "critic.model.path")
    assert len(SHAPES) == 9


def test_models_of_a_config() -> None:
    models = models_of(tiny("critic.count=2"))
    assert models.critic is not None and models.critic.count == 2 and models.actor.head is None
    assert models_of(tiny("advantage.type=group")).critic is None


def test_the_shapes_of_a_step() -> None:
    """64 tokens a row at most: 16 of a prompt that 2 rows share, and 48 behind it, padded to 64."""
    work = workload_of(tiny())
    assert (work.rows, work.layout.group, work.layout.prefix, work.length) == (8, 2, 16, 80)
    assert work.read(4) == 4 * 64 + 2 * 16 and work.pairs(4) == 4 * 64 * 80 + 2 * 16 * 16
    assert (work.slots, work.positions, work.prompt) == (8, 63, 16)
    alone = workload_of(tiny("update.shared_prefix=false", "rollout.slots=3"), row_tokens=32)
    assert (alone.layout.group, alone.length, alone.slots, alone.tokens) == (1, 64, 3, 31)
