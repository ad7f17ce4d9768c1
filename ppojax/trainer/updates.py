"""The optimizer steps of one training step."""

from __future__ import annotations

import jax
import numpy as np

from ppojax.config import Config
from ppojax.errors import DivergedError
from ppojax.experience.batch import without_records
from ppojax.experience.minibatch import minibatches, move_rows, put_back
from ppojax.models.forward import Heads
from ppojax.trainer.build import DROP_ACTOR, DROP_CRITIC, Parts, States, dropout_key, noise_key
from ppojax.transfer import fetch
from ppojax.types import Batch, Layout, TokenTrace, TrainState
from ppojax.update.actor import actor_step
from ppojax.update.critic import critic_step
from ppojax.update.offload import rest, wake
from ppojax.update.state import skipped_in_a_row


def update_critic(
    config: Config, parts: Parts, states: States, batch: Batch, layout: Layout, number: int
) -> dict[str, float]:
    """Fit the critics to the step's returns.

    Raises:
        DivergedError: too many updates in a row had gradients that are not finite.
    """
    batch, done, mesh = batch._replace(experience=without_records(batch.experience)), [], parts.critic_mesh
    if mesh != parts.mesh:
        batch = move_rows(batch, mesh=mesh)
    assert parts.critic is not None and states.critic is not None
    state = wake(states.critic)
    states.critic = None  # the step takes its arrays over
    for epoch in range(config.update.epochs * config.critic.updates):
        seed = (config.seed, number, epoch, 1)
        for minibatch in minibatches(batch, config.update.minibatches, seed, layout.group, mesh):
            state, metrics = critic_step(
                state,
                minibatch,
                model=parts.critic,
                config=config.critic,
                layout=layout,
                microbatch_rows=config.update.microbatch_rows,
                mesh=mesh,
                frozen=parts.critic_base,
                key=dropout_key(parts.critic, config.seed, number, DROP_CRITIC, len(done)),
            )
            done.append(metrics)
    states.critic = rest(state, config.critic.offload)
    _check_finite("critic", state, config.update.max_skipped)
    return _average(done)


def update_actor(
    config: Config, parts: Parts, states: States, batch: Batch, layout: Layout, heads: Heads, number: int
) -> tuple[dict[str, float], TokenTrace]:
    """Improve the policy.

    Returns:
        Metrics, and what was seen of each token when it was last read, on the host, in the batch's order.

    Raises:
        DivergedError: too many updates in a row had gradients that are not finite.
    """
    done, seed, traces = [], (), []
    states.actor = wake(states.actor)
    for epoch in range(config.update.epochs):
        seed, traces = (config.seed, number, epoch, 0), []
        for minibatch in minibatches(batch, config.update.minibatches, seed, layout.group, parts.mesh):
            states.actor, metrics, trace = actor_step(
                states.actor,
                minibatch,
                model=parts.actor,
                loss=config.loss,
                optimizer=config.actor.optimizer,
                temperature=config.rollout.temperature,
                layout=layout,
                microbatch_rows=config.update.microbatch_rows,
                mesh=parts.mesh,
                router=config.actor.router,
                frozen=parts.actor_base,
                key=dropout_key(parts.actor, config.seed, number, DROP_ACTOR, len(done)),
                heads=heads,
                perturb=config.actor.perturb,
                noise_key=noise_key(config.actor.perturb, config.seed, number, len(done)),
            )
            done.append(metrics)
            traces.append(trace)
    states.actor = rest(states.actor, config.actor.offload)
    _check_finite("actor", states.actor, config.update.max_skipped)
    # Only before the first update is the gap to the sampler numerical; afterwards it is learning.
    first = {name: float(v) for name, v in done[0].items() if name.startswith("sampling/")}
    last = [put_back(parts, seed, layout.group) for parts in zip(*fetch(traces), strict=True)]
    return _average(done) | first, TokenTrace(*last)


def _check_finite(who: str, state: TrainState, most: int) -> None:
    in_a_row = skipped_in_a_row(state)
    if in_a_row >= most:
        raise DivergedError(
            f"{who}: gradients were not finite in {in_a_row} updates in a row (update.max_skipped): "
            f"lower {who}.optimizer.learning_rate or look at the last transcripts"
        )


def _average(steps: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over the optimizer steps of one training step; maxima for names that end in `_max`."""
    host = jax.device_get(steps)
    return {
        name: float(np.max([m[name] for m in host]) if name.endswith("_max") else np.mean([m[name] for m in host]))
        for name in host[0]
    }
