"""One training step, in the order in which data flows through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from ppojax.config import Config
from ppojax.errors import DataError
from ppojax.experience.batch import make_batch, without_records
from ppojax.experience.pack import bucketed, lay_out, pack
from ppojax.experience.score import Scorers, score
from ppojax.experience.summary import advantage_metrics, rollout_metrics, staleness_metrics
from ppojax.models.forward import Heads, Params, head_VD
from ppojax.models.lora import combine, fingerprint, merge
from ppojax.models.perturb import apart
from ppojax.models.pretrained import Loaded
from ppojax.models.settings import CutCritic
from ppojax.rollout.sync import sampler_params, to_trainer
from ppojax.rollout.tasks import task_stream
from ppojax.runtime.compiling import compile_metrics
from ppojax.trainer.build import States, build, build_critic
from ppojax.trainer.controls import Controls
from ppojax.trainer.meter import Meter
from ppojax.trainer.player import Player
from ppojax.trainer.updates import update_actor, update_critic
from ppojax.trainer.warm_start import warm_start
from ppojax.types import Batch, Experience, Layout, Rollout, Row, TokenTrace
from ppojax.update.offload import wake


@dataclass(frozen=True)
class StepOut:
    """What one step saw and did."""

    step: int
    metrics: dict[str, float]
    rollout: Rollout
    batch: Batch
    rows: Sequence[Row | None]  # of the rollout, where they stand in the batch
    trace: TokenTrace | None = None  # of the batch's tokens, on the host; None where only the critic learnt


class Trainer:
    """A run that is advanced one step at a time.

    ```python
    trainer = Trainer(Config.load("config=configs/tiny.yaml"))
    while trainer.number < 10:
        print(trainer.step().metrics["reward/mean"])
    ```
    """

    def __init__(self, config: Config) -> None:
        """Load models and tasks; train nothing yet.

        Raises:
            ConfigError, DataError: see `ppojax.trainer.build.build`.
        """
        self.config = config
        self.parts, self.states = build(config)
        stream = task_stream(self.parts.train_tasks, config.rollout.prompts, config.seed)
        self.player = Player(config, self.parts, stream)
        self.number = 0  # steps done
        self.reference = self._copy_of_actor()
        self.older = self._copies_to_play()
        self.controls = Controls.start(config)

    def warm_start(self) -> list[float]:
        """Do the supervised steps that the config asks for, if any; return their losses."""
        settings = self.config.warm_start
        if settings is None:
            return []
        self.states.actor, losses = warm_start(self.config, settings, self.parts, self.states.actor)
        # What was taken from the actor is taken again, from the policy that training starts with.
        self.reference = self._copy_of_actor()
        self.older = self._copies_to_play()
        if self.parts.critic is not None and isinstance(self.config.critic.model, CutCritic):
            warm = Loaded(self.parts.actor, self.policy(), self.parts.tokenizer)
            _, _, self.states.critic = build_critic(self.config, warm, self.parts.mesh)
        return losses

    def step(self) -> StepOut:
        """Sample, score, estimate advantages, update the critic, then the actor.

        Raises:
            DivergedError: too many updates in a row had gradients that are not finite.
            DataError: a prompt is too long, or too many episodes fail (see `play_batch`).
        """
        config, parts, states, meter = self.config, self.parts, self.states, Meter()
        weights = self._weights_to_play()
        rollout = self.player(self.number, weights, meter)
        heads = self._heads(combine(parts.actor_base, weights[0]))
        self.older = weights[1:]
        del weights  # the oldest ones are not needed in the update
        rows, layout, experience = self._pack(rollout)
        with meter.timed("values"):
            experience = jax.block_until_ready(self._score(experience, layout))
        earned_BT, scale = experience.reward_BT, self.controls.entropy_scale
        experience, metrics = self.controls.penalize(experience)
        batch = make_batch(experience, estimator=config.advantage, earned_BT=earned_BT, entropy_scale=scale)
        metrics |= rollout_metrics(rollout.rows) | rollout.metrics | advantage_metrics(batch, config.advantage.gamma)
        metrics |= staleness_metrics(rollout.rows, self.number) if config.rollout.staleness else {}
        if states.critic is not None:
            with meter.timed("update_critic"):
                metrics |= update_critic(config, parts, states, batch, layout, self.number)
        trace = None
        if states.critic is None or self.number >= config.critic.warmup_steps:
            with meter.timed("update_actor"):
                updated, trace = update_actor(config, parts, states, batch, layout, heads, self.number)
            metrics |= updated
        metrics |= self.controls.follow_entropy(metrics)
        self.number += 1
        metrics |= meter.performance(rollout.rows, parts.devices) | compile_metrics()
        metrics |= meter.utilisation(parts.actor.spec, experience, layout, config.update.epochs, parts.mesh)
        # A caller may keep this over the next step: without the arrays that are large on the devices.
        batch = batch._replace(experience=without_records(batch.experience))
        return StepOut(self.number, metrics, rollout, batch, rows, trace)

    def _pack(self, rollout: Rollout) -> tuple[Sequence[Row | None], Layout, Experience]:
        config, settings = self.config, self.config.rollout
        group = settings.group_size if config.update.shared_prefix else 1
        buckets = {"bucket": settings.row_bucket, "most": settings.max_tokens}
        rows, layout = lay_out(rollout.rows, group=group, prompt_bucket=settings.prompt_bucket, **buckets)
        experience = pack(
            rows,
            batch=bucketed(len(rows), settings.rows, steps=2),
            actions=config.actions,
            mesh=self.parts.mesh,
            layout=layout,
            **buckets,
        )
        return rows, layout, experience

    def _score(self, experience: Experience, layout: Layout) -> Experience:
        return score(
            self._scorers(),
            experience,
            actor=self.parts.actor,
            critic=self.parts.critic,
            layout=layout,
            temperature=self.config.rollout.temperature,
            microbatch_rows=self.config.update.microbatch_rows,
            logp_ref="logp_ref" in self.config.needs,
            hidden_ref="hidden_ref" in self.config.needs,
        )

    def policy(self) -> Params:
        """The actor's parameters, all of them."""
        return combine(self.parts.actor_base, apart(self.states.actor.params)[0])

    def sampler_policy(self) -> Params:
        """The actor's parameters as the sampler reads them (see `sampler_params`)."""
        return sampler_params(self.policy(), self.parts.collector.sampler.model)

    def merged_policy(self) -> Params:
        """The actor's parameters with its adapters folded in, float32."""
        lora = self.parts.actor.lora
        return self.policy() if lora is None else merge(self.policy(), lora, "float32")

    def close(self) -> None:
        """Give up episodes that are being played for later steps, and end their thread. `step` begins them again."""
        self.player.stop()

    def state(self) -> dict[str, Any]:
        """The arrays that a checkpoint holds."""
        whole = {"actor": self.states.actor, "critic": self.states.critic, "reference": self.reference}
        return whole | {"older": self.older}

    def position(self) -> dict[str, Any]:
        """The rest of what a checkpoint holds, as JSON: randomness needs only the seed and the step."""
        state = {"tasks": self.player.tasks, "controls": self.controls.position()}
        return {"step": self.number, **state, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "tokenizer": self.parts.tokenizer.fingerprint(), **self._bases}

    @cached_property
    def _bases(self) -> dict[str, str]:
        """What says which frozen weights the adapters belong to, for they are in no checkpoint."""
        bases = {"model": self.parts.actor_base, "critic.model": self.parts.critic_base}
        return {f"frozen weights of {name}": fingerprint(base) for name, base in bases.items() if base}

    def restore(self, state: dict[str, Any], position: dict[str, Any]) -> None:
        """Go back to where `state()` and `position()` were taken.

        Raises:
            DataError: they were taken with another seed, another tokenizer or other frozen weights.
        """
        for name, here in self._identity().items():
            if position.get(name) != here:
                raise DataError(
                    f"resume: the checkpoint was written with {name} {position.get(name)}, this run has {here}: "
                    f"use the same {name}, or start another run.name"
                )
        self.states = States(state["actor"], state["critic"])
        self.reference, self.older = state["reference"], state["older"]
        self.number = position["step"]
        self.player.restore(position["tasks"])
        self.controls.restore(position["controls"])

    def _copy_of_actor(self) -> Params | None:
        if not self.config.needs & {"logp_ref", "hidden_ref"}:
            return None
        return self._copy()

    def _copy(self) -> Params:
        return jax.tree.map(lambda p: p.copy(), apart(self.states.actor.params)[0])

    def _copies_to_play(self) -> list[Params]:
        """What the actor was in the steps before, oldest first, as far as stale weights are played: itself, so far."""
        stale = self.config.rollout.staleness
        return [self._copy()] * stale if stale else []

    def _scorers(self) -> Scorers:
        base, critic = self.parts.actor_base, self.states.critic
        return Scorers(
            old=self.policy() if "logp_old" in self.config.needs else None,
            reference=None if self.reference is None else combine(base, self.reference),
            critic=None if critic is None else combine(self.parts.critic_base, wake(critic.params)),
        )

    def _weights_to_play(self) -> list[Params]:
        """What is trained of the policy: as this step's episodes are drawn from it, and after each step since."""
        return [*self.older, self._copy()] if self.older else [apart(self.states.actor.params)[0]]

    def _heads(self, played: Params) -> Heads:
        """The heads of the policies that the loss compares with; the update takes the actor's own arrays over."""
        head, own = head_VD(played), head_VD(self.policy())
        behavior = reference = None
        if self.config.records.hidden:
            cast = head.astype(self.parts.collector.sampler.model.dtype)
            behavior = cast.copy() if cast is own else to_trainer(cast, own.sharding)
        if "hidden_ref" in self.config.needs:
            assert self.reference is not None
            reference = head_VD(combine(self.parts.actor_base, self.reference)).astype(self.parts.actor.dtype)
        return Heads(behavior, reference)
