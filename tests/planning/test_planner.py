"""Plans of the tiny config on 8 host devices: compiled, and by formula."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from ppojax.config import Config
from ppojax.errors import ConfigError
from ppojax.mesh import MeshConfig
from ppojax.models.flops import update_flops
from ppojax.planning import planner
from ppojax.planning.advice import advise
from ppojax.planning.collectives import Collective
from ppojax.planning.memory import cache_bytes, held, memory_of_step
from ppojax.planning.models import models_of, weights_of
from ppojax.planning.planner import Assumed, Report, make_plan
from ppojax.planning.targets import parse_target
from ppojax.planning.timing import speed_of
from ppojax.planning.workload import passes_of, workload_of
from tiny_config import tiny

TARGET = parse_target("cpu:8")
MESH = ("mesh.fsdp=4", "mesh.tensor=2", "update.microbatch_rows=8", "update.minibatches=1", "rollout.prompts=8")


@cache
def compiled() -> tuple[Report, dict[str, object]]:
    """A plan of which only the programs of the critic and of sampling are compiled, and what XLA said of them."""
    lowered, all_steps = {}, planner.plan_steps

    def few(*args: object) -> object:
        plan = all_steps(*args)
        steps = [s for s in plan.steps if s.name in ("prefill", "critic")]
        lowered.update({s.name: s.lower() for s in steps})
        return plan._replace(steps=tuple(s._replace(lower=lambda s=s: lowered[s.name]) for s in steps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "plan_steps", few)
        return make_plan(tiny(*MESH), TARGET), lowered


def test_memory_is_that_of_the_compiled_programs() -> None:
    report, lowered = compiled()
    assert report.compiled and report.fits
    for program in report.programs:
        said = lowered[program.name].compile().memory_analysis()
        assert program.memory.arguments == said.argument_size_in_bytes
        assert program.memory.temporary == said.temp_size_in_bytes
        terms = report.memory[program.name]
        extra = said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
        # Beside what is held: its own arguments, of which the critic's state is held already.
        state = terms.parameters + terms.optimizer
        other = held(report.config, report.models)
        assert state == pytest.approx(other.parameters + other.optimizer, rel=0.01)
        assert terms.total >= state + extra
    cache = cache_bytes(report.config, report.models.actor.spec, report.work)
    assert cache <= report.memory["prefill"].cache < 1.1 * cache  # and the last hidden states


def test_collectives_come_by_axis() -> None:
    report, _ = compiled()
    critic = next(p for p in report.programs if p.name == "critic")
    assert {axis for c in critic.collectives for axis in c.axes} == {"fsdp", "tensor"}
    assert all(c.bytes > 0 and not c.turn for c in critic.collectives)
    # Weights travel over fsdp, and not activations: gathered and summed in each of two microbatches.
    assert report.models.critic is not None
    weights = 4 * weights_of(report.models.critic, MeshConfig(tensor=2)).all
    assert sum(c.bytes for c in critic.collectives if c.axes == ("fsdp",)) < 2 * 8 * weights
    assert report.speed.parts["critic"].work.sent.keys() == {c.axes for c in critic.collectives}


def test_what_is_held_by_hand() -> None:
    """12 bytes a trained parameter; with adapters 12 of them and 2 of a frozen one; 4 more for a reference."""
    models = models_of(tiny())
    both = sum(weights_of(m).all for m in models if m is not None)
    assert held(tiny(), models).total == 12 * both
    lora = tiny(
        "model.lora.rank=2",
        "model.base_dtype=bfloat16",
        "advantage.type=group",
        "loss.type=ppo",
        "loss.kl.coefficient=0.1",
    )
    actor = weights_of(models_of(lora).actor)
    assert held(lora, models_of(lora)).total == 12 * actor.trained + 2 * actor.frozen + 4 * actor.trained


def test_the_formula_shrinks_with_every_axis() -> None:
    def peak(*arguments: str) -> float:
        config = tiny(*MESH[2:], *arguments)
        return max(t.total for t in memory_of_step(config, models_of(config), workload_of(config)).values())

    assert peak("mesh.fsdp=2") < peak() and peak("mesh.tensor=2") < peak()
    assert peak("update.microbatch_rows=4") < peak()
    assert peak("rollout.mode=one_step_off") > peak()


def test_time_by_hand() -> None:
    """Every part is counted, and what compiled programs send is sent as often as they are called."""
    config = tiny("critic.updates=3", "update.epochs=2", "rollout.slots=4")
    models, work = models_of(config), workload_of(config)
    speed = speed_of(config, models, work, TARGET)
    assert speed.step_s == pytest.approx(sum(p.seconds for p in speed.parts.values()))
    assert speed.tokens_per_device == pytest.approx(work.rows * work.tokens / speed.step_s)
    assert passes_of(work) == 2 * work.written
    one = Collective("all-reduce", ("data",), 1, 7.0)
    sent = {"actor": (4.0, [one]), "decode": (3.0, [one._replace(turn=True), one])}
    parts = speed_of(config, models, work, TARGET, sent).parts
    assert parts["actor"].work.sent == {("data",): 4 * 7.0}
    assert parts["gen"].work.sent == {("data",): 7.0 * 2 * work.written + 3 * 7.0}
    assert models.critic is not None
    once = update_flops(models.critic.spec, work.read(work.rows), work.pairs(work.rows), 0)
    assert parts["critic"].flops == pytest.approx(2 * 3 * once)


def test_over_memory_three_changes_that_are_tried_out() -> None:
    config, small = tiny(*MESH[2:]), Assumed(memory_share=1e-6)
    report = make_plan(config, TARGET, small, compiling=False)
    assert not report.fits and not report.compiled
    changes = advise(report, small)
    assert len(changes) == 3 == len({c.settings for c in changes})
    assert all(c.bytes < report.peak[1].total for c in changes)
    # The first change really has what is said of it.
    first = [part for part in changes[0].settings.split() if "=" in part]
    again = make_plan(tiny(*MESH[2:], *first), parse_target("cpu:64"), compiling=False)
    assert again.peak[1].total == pytest.approx(changes[0].bytes)


def test_meshes_that_do_not_fit_the_target() -> None:
    with pytest.raises(ConfigError, match=r"mesh 1x4x1x2 .* needs 8 devices, target=cpu:4 has 4"):
        make_plan(tiny(*MESH), parse_target("cpu:4"), compiling=False)
    with pytest.raises(ConfigError, match=r"mesh\.tensor = 4 does not divide heads = 2"):
        config = tiny().model_copy(update={"mesh": MeshConfig(tensor=4)})
        make_plan(config, TARGET, compiling=False)
    assert make_plan(tiny(), TARGET, compiling=False).notes == ("the mesh uses 1 of the target's 8 devices",)


def test_a_width_that_an_optimizer_over_data_does_not_split() -> None:
    """As a run refuses it: see `ppojax.trainer.build`."""
    over = ("model.fresh.width=36", "mesh.data=8", "actor.optimizer.over_data=true", "warm_start=null")
    config = tiny(*over, "rollout.prompts=8", "update.minibatches=1", "update.microbatch_rows=16")
    fault = r"mesh.fsdp x mesh.data = 8 does not divide embed \(actor.optimizer.over_data\) = 36; legal: 1, 2, 3"
    with pytest.raises(ConfigError, match=fault):
        make_plan(config, TARGET, compiling=False)


def test_advice_for_a_sampler_of_more_devices_than_the_trainer() -> None:
    config = tiny("rollout.mesh.data=4", "rollout.devices=own")
    small = Assumed(memory_share=1e-6)
    report = make_plan(config, TARGET, small, compiling=False)
    assert not report.fits and len(advise(report, small)) == 3


def test_paths_that_only_a_device_compiles_are_left_and_named() -> None:
    report = make_plan(tiny("model.attention=cudnn", "model.statistics=triton"), parse_target("h200"), compiling=False)
    assert report.models.actor.attention == "xla" and report.models.actor.statistics is None
    assert [note.split(":")[0] for note in report.notes] == ["model.attention=cudnn", "model.statistics=triton"]


def test_a_sampler_with_devices_of_its_own() -> None:
    config = tiny("rollout.devices=own", "rollout.mesh.data=2", "rollout.mode=one_step_off", "mesh.data=2")
    report = make_plan(config, TARGET, compiling=False)
    assert report.notes == ("the mesh uses 4 of the target's 8 devices",)
    assert report.memory["decode"].optimizer == 0 and report.memory["actor"].cache == 0
    parts = report.speed.parts
    rest = sum(p.seconds for name, p in parts.items() if name != "gen")
    assert report.speed.step_s == pytest.approx(max(parts["gen"].seconds, rest))


def test_cost() -> None:
    report = make_plan(tiny(), TARGET, compiling=False)
    assert report.cost(2.0) == pytest.approx(2.0 * 8 * report.speed.step_s / 3600)
    assert isinstance(report.config, Config) and replace(report, limit=0.0).fits is False
