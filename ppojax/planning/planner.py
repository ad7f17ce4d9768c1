"""A plan: whether a run fits on a target, where its memory goes, and how long a step should take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ppojax.config import Config
from ppojax.config.meshes import undivided
from ppojax.errors import ConfigError
from ppojax.mesh import AXES
from ppojax.planning.abstract import bytes_of
from ppojax.planning.memory import Terms, awake_of, held, memory_of_step, own_mesh
from ppojax.planning.models import Models, models_of
from ppojax.planning.program import Compiling, Program, inspect_all
from ppojax.planning.steps import Plan, plan_steps
from ppojax.planning.targets import Target
from ppojax.planning.timing import Speed, speed_of
from ppojax.planning.topology import NoCompiler, devices_of, mesh_on
from ppojax.planning.workload import Workload, workload_of

GENERATION = ("prefill", "share", "extend", "decode")  # programs that run while the sampler's slots are there
PARTS = {"values": "score"}  # of a step, where they are called otherwise than their program


class Assumed(NamedTuple):
    """What a config does not say: how long rows are, and how much of a device's memory programs may take."""

    prompt_tokens: int | None = None  # see `ppojax.planning.workload.workload_of`, also for the next two
    row_tokens: int | None = None
    segments: int = 1
    memory_share: float = 0.92


DEFAULT = Assumed()


@dataclass(frozen=True)
class Report:
    """A plan.

    Attributes:
        compiled: the real programs were compiled for the target; else memory and collectives are estimates.
        programs: what was compiled.
        compiling: what that took, if anything was.
        memory: bytes of one device while each program (compiled) or part of a step (estimated) runs.
        limit: bytes that programs may take.
        notes: where the plan leaves what will run, and what is idle.
    """

    config: Config
    target: Target
    models: Models
    work: Workload
    compiled: bool
    programs: tuple[Program, ...]
    memory: dict[str, Terms]
    limit: float
    speed: Speed
    notes: tuple[str, ...]
    compiling: Compiling | None = None

    @property
    def peak(self) -> tuple[str, Terms]:
        """When most memory is needed, and for what."""
        name = max(self.memory, key=lambda name: self.memory[name].total)
        return name, self.memory[name]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak[1].total <= self.limit

    def cost(self, price: float) -> float:
        """Dollars of one step, at a price of one device for an hour; idle devices of the target are paid, too."""
        return price * self.target.size * self.speed.step_s / 3600


def make_plan(config: Config, target: Target, assumed: Assumed = DEFAULT, *, compiling: bool = True) -> Report:
    """Plan a run.

    With `compiling` its programs are compiled for the target, if what compiles for it is installed.

    Raises:
        ConfigError: the mesh has more devices than the target or does not divide the models, or a shape is not known.
        DataError: see `ppojax.planning.shapes.shape_of`.
    """
    models, notes = compilable(models_of(config), target)
    check(config, models, target)
    notes += idle(config, target)
    how = assumed._asdict()
    share = how.pop("memory_share")
    work = workload_of(config, **how)
    estimate = memory_of_step(config, models, work)
    programs: tuple[Program, ...] = ()
    memory, calls, took = estimate, {}, None
    everything = min(held(config, models, part).total for part in ("gen", "score", "critic", "actor"))
    if compiling and everything > share * target.chip.memory:
        notes.append(
            f"not compiled: parameters and optimizer state alone take {everything / 2**30:.1f} GiB of a device; the "
            "rest is an estimate by formula"
        )
    elif compiling:
        try:
            devices = devices_of(target)
        except NoCompiler as missing:
            notes.append(f"not compiled, all of it is an estimate by formula: {missing}")
        else:
            mesh, own = mesh_on(config.mesh, devices), own_mesh(config)
            beside = None if own is None else mesh_on(own, devices[mesh.size :])
            plan = plan_steps(config, models, mesh, work, beside)
            programs, took = inspect_all([(step.name, step.lower, step.mesh) for step in plan.steps])
            memory = _measured(config, plan, programs, estimate)
            calls = {p.name: (step.calls, p.collectives) for step, p in zip(plan.steps, programs, strict=True)}
    speed = speed_of(config, models, work, target, calls if programs else None)
    limit = share * target.chip.memory
    return Report(config, target, models, work, bool(programs), programs, memory, limit, speed, tuple(notes), took)


def compilable(models: Models, target: Target) -> tuple[Models, list[str]]:
    """Leave out what only a device's own libraries compile, and say so."""
    notes, actor = [], models.actor
    if actor.attention != "xla":
        notes.append(
            f"model.attention={actor.attention}: planned with XLA's attention, whose scores take more memory and time: "
            "cuDNN's calls are not compiled without a GPU"
        )
    change: dict[str, Any] = {"attention": "xla"}
    needed = {"triton": None, "pallas_gpu": "cuda", "pallas_tpu": "tpu"}
    if actor.statistics in needed and needed[actor.statistics] != target.chip.platform:
        notes.append(f"model.statistics={actor.statistics}: planned with tiled, which compiles for this target")
        change["statistics"] = None
    critic = None if models.critic is None else replace(models.critic, **change)
    return Models(replace(actor, **change), critic), notes


def check(config: Config, models: Models, target: Target) -> None:
    """Raise ConfigError for meshes that are larger than the target or do not divide a model, as a run would."""
    own = own_mesh(config)
    used = config.mesh.size + (0 if own is None else own.size)
    if used > target.size:
        beside = "" if own is None else f" and rollout.mesh {'x'.join(map(str, own.shape))} beside it"
        raise ConfigError(
            f"mesh {'x'.join(map(str, config.mesh.shape))} ({' x '.join(AXES)}){beside} needs {used} devices, "
            f"target={target} has {target.size}: make the product of mesh.{', mesh.'.join(AXES)} smaller"
        )
    check_divides(config, models)


def check_divides(config: Config, models: Models) -> None:
    """Raise ConfigError for meshes that do not divide a model, as a run would."""
    faults = undivided(config, models.actor.spec.axis_sizes(), "actor")
    if models.critic is not None:
        faults += undivided(config, models.critic.spec.axis_sizes(), "critic")
    if faults:
        raise ConfigError("; ".join(dict.fromkeys(faults)))


def idle(config: Config, target: Target) -> list[str]:
    """What of the target the mesh leaves out."""
    own = own_mesh(config)
    used = config.mesh.size + (0 if own is None else own.size)
    return [] if used == target.size else [f"the mesh uses {used} of the target's {target.size} devices"]


def _measured(
    config: Config, plan: Plan, programs: tuple[Program, ...], estimate: dict[str, Terms]
) -> dict[str, Terms]:
    """Memory while each compiled program runs: what is held beside it, its arguments, and its temporary memory.

    The compiler gives one number for all that is temporary: gradients and logits in it are by formula, and what is left
    counts as activations.
    """
    kept, out = plan.held, {}
    states = [(who, s) for who, s in (("actor", kept.actor), ("critic", kept.critic)) if s is not None]
    offload = {"actor": config.actor.offload, "critic": config.critic.offload}
    always = bytes_of([kept.frozen, kept.reference, kept.older])
    inputs = {step.name: bytes_of(step.inputs) for step in plan.steps}
    cache, played = bytes_of(plan.slots), bytes_of(kept.played)
    apart, together = own_mesh(config) is not None, config.rollout.mode == "one_step_off"
    for program in programs:
        name, generating = program.name, program.name in GENERATION
        sampled = generating or (together and not apart)
        part = "gen" if generating else PARTS.get(name, name)
        awake = {who: awake_of(offload[who], who, part) for who, _ in states}
        parameters = always + sum(awake[who][0] * bytes_of(state.params) for who, state in states)
        optimizer = sum(awake[who][1] * bytes_of(state.opt_state) for who, state in states)
        formula = estimate.get(PARTS.get(name, name), Terms())
        new = program.memory.new + inputs[name] - (cache if generating else 0)
        gradients = min(formula.gradients, new)
        logits = min(formula.logits, new - gradients)
        out[name] = Terms(
            (0 if generating and apart else parameters) + (played if sampled else 0),
            0 if generating and apart else optimizer,
            gradients,
            new - gradients - logits,
            cache if sampled else 0,
            logits,
        )
    return out
