"""Supervised steps on an environment's demonstrations, before reinforcement learning."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ppojax.config import Config
from ppojax.errors import DataError, DivergedError
from ppojax.experience.pack import pack
from ppojax.losses import NLL
from ppojax.models.perturb import apart
from ppojax.rollout.demonstrate import demonstrate
from ppojax.rollout.tasks import task_stream
from ppojax.trainer.build import DROP_ACTOR, OUTSIDE, Parts, dropout_key
from ppojax.types import Batch, Layout, TrainState
from ppojax.update.actor import actor_step
from ppojax.update.offload import rest
from ppojax.update.settings import WarmStartConfig
from ppojax.update.state import init_state, skipped_in_a_row


def warm_start(
    config: Config, settings: WarmStartConfig, parts: Parts, state: TrainState
) -> tuple[TrainState, list[float]]:
    """Fit demonstrations by maximum likelihood; return a state with a fresh optimizer, and each step's loss.

    Raises:
        DataError: a demonstration has more tokens than the policy may write.
        DivergedError: the last update was refused because its gradient was not finite.
    """
    rng = np.random.default_rng((config.seed, settings.steps))
    stream = task_stream(parts.train_tasks, settings.rows, config.seed ^ 1)
    weights, deviations = apart(state.params)
    optimizer, spread = settings.optimizer.build(), settings.optimizer.over_data
    state = init_state(parts.actor, weights, optimizer, parts.mesh, spread=spread)
    actions = config.env.max_turns * config.rollout.max_turn_tokens
    losses = []
    for _ in range(settings.steps):
        rows = demonstrate(config.env, parts.tokenizer, next(stream), wrong=settings.corrupt, rng=rng)
        longest = max(int(row.action.sum()) for row in rows)
        if longest > actions:
            raise DataError(
                f"warm_start: a demonstration writes {longest} tokens, rollout.max_turn_tokens x env.max_turns allows "
                f"{actions}: raise rollout.max_turn_tokens"
            )
        experience = pack(
            rows,
            batch=settings.rows,
            bucket=config.rollout.bucket,
            actions=actions,
            mesh=parts.mesh,
        )
        state, metrics, _ = actor_step(
            state,
            Batch(experience, jnp.ones_like(experience.reward_BT)),
            model=parts.actor,
            loss=NLL(),
            optimizer=settings.optimizer,
            temperature=1.0,
            layout=Layout(),
            microbatch_rows=settings.rows,
            mesh=parts.mesh,
            router=config.actor.router,
            frozen=parts.actor_base,
            key=dropout_key(parts.actor, config.seed, OUTSIDE, DROP_ACTOR, len(losses)),
        )
        losses.append(metrics["actor/loss"])
    if skipped_in_a_row(state):
        raise DivergedError(
            "warm_start: gradients were not finite at its end: lower warm_start.optimizer.learning_rate"
        )
    params = {**state.params, **deviations}
    optimizer, spread = config.actor.build_optimizer(), config.actor.optimizer.over_data
    state = init_state(parts.actor, params, optimizer, parts.mesh, spread=spread)
    return rest(state, config.actor.offload), [float(x) for x in losses]
