"""Score packed rows: log-probabilities before the update and the critics' values."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppojax.experience.batch import without_records
from ppojax.experience.minibatch import join_rows, move_rows, split_rows
from ppojax.models.forward import ModelDef, Params, action_states, score_tokens, values
from ppojax.types import Experience, Layout


class Scorers(NamedTuple):
    """The parameters that score rows; None for what nobody asks for."""

    old: Params | None = None
    reference: Params | None = None
    critic: Params | None = None


def score(
    scorers: Scorers,
    experience: Experience,
    *,
    actor: ModelDef,
    critic: ModelDef | None,
    layout: Layout,
    temperature: float,
    microbatch_rows: int,
    logp_ref: bool | None = None,
    hidden_ref: bool = False,
) -> Experience:
    """Fill `logp_old_BT`, `logp_ref_BT` and `value_MBT` from the parameters that are given.

    Rows go through in microbatches of the update's own shape, so that log-probabilities taken here and there come
    from the same computation. Where the sampler's experts are recorded, policy and reference both replay them: their
    difference is then one of weights, and zero at the start. With `hidden_ref` the reference policy's hidden states at
    the actions are kept, `hidden_ref_BAD`, and its log-probabilities only where `logp_ref` says so.

    Critics with a mesh of their own read the rows there, and their values come back to the actor's.
    """
    how = partial(
        _score, actor=actor, critic=critic, layout=layout, temperature=temperature, microbatch_rows=microbatch_rows
    )
    asked = {"logp_ref": not hidden_ref if logp_ref is None else logp_ref, "hidden_ref": hidden_ref}
    rows = without_records(experience)  # a compiled function would copy what it only hands through
    if critic is None or critic.mesh == actor.mesh:
        filled = how(scorers, rows, **asked)
    else:
        assert critic.mesh is not None and actor.mesh is not None
        filled = how(scorers._replace(critic=None), rows, **asked)
        read = how(Scorers(critic=scorers.critic), move_rows(rows, mesh=critic.mesh), logp_ref=False, hidden_ref=False)
        filled = filled._replace(value_MBT=move_rows(read, mesh=actor.mesh).value_MBT)
    return filled._replace(recorded=experience.recorded)


@partial(
    jax.jit, static_argnames=("actor", "critic", "layout", "temperature", "microbatch_rows", "logp_ref", "hidden_ref")
)
def _score(
    scorers: Scorers,
    experience: Experience,
    *,
    actor: ModelDef,
    critic: ModelDef | None,
    layout: Layout,
    temperature: float,
    microbatch_rows: int,
    logp_ref: bool,
    hidden_ref: bool,
) -> Experience:
    def logp(params: Params | None, rows: Experience) -> jax.Array | None:
        return None if params is None else score_tokens(actor, params, rows, layout, temperature=temperature).logp

    def one(rows: Experience) -> tuple[jax.Array | None, ...]:
        value_BMT = None
        if scorers.critic is not None:
            assert critic is not None
            value_BMT = jnp.swapaxes(values(critic, scorers.critic, rows, layout), 0, 1)
        ref, hidden_BAD = scorers.reference, None
        if hidden_ref:
            assert ref is not None
            hidden_BAD, _ = action_states(actor, ref, rows, layout)
        return logp(scorers.old, rows), logp(ref if logp_ref else None, rows), value_BMT, hidden_BAD

    parts = jax.lax.map(one, split_rows(experience, microbatch_rows, layout.group))
    old_BT, ref_BT, value_BMT, hidden_BAD = jax.tree.map(lambda x: join_rows(x, layout.group), parts)
    value_MBT = None if value_BMT is None else jnp.swapaxes(value_BMT, 0, 1)
    return experience._replace(logp_old_BT=old_BT, logp_ref_BT=ref_BT, value_MBT=value_MBT, hidden_ref_BAD=hidden_BAD)
