"""Episodes of several rows: who goes on where whom was cut, and what passes over the cut.

A compaction ends a row (a segment) with `Ending.CUT` and goes on in another, which may lie anywhere in the batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.types import Ending, Experience

CutRule = Literal["chain", "scale", "broadcast"]


class Chains(NamedTuple):
    """The rows of a batch as segments of episodes; rows that are not valid belong to none.

    Made of comparisons only, so that an experience on the host gives arrays on the host.
    """

    later_BB: jax.Array  # bool: column c is a later segment of row b's episode
    next_B: jax.Array  # int32: the row that goes on where row b was cut; means nothing where `linked_B` is False
    linked_B: jax.Array  # bool: there is such a row
    depth: jax.Array  # int32: a bound of the links of any chain

    @classmethod
    def of(cls, e: Experience) -> Chains:
        """Compare every row with every other."""
        same_BB = (e.episode_B[:, None] == e.episode_B[None, :]) & e.valid_B[:, None] & e.valid_B[None, :]
        ahead_BB = e.segment_B[None, :] - e.segment_B[:, None]
        next_BB = same_BB & (ahead_BB == 1) & (e.ending_B == Ending.CUT)[:, None]
        return cls(same_BB & (ahead_BB > 0), next_BB.argmax(1), next_BB.any(1), e.segment_B.max())


def over_rows(which_BB: Bool[jax.Array, "B B"], x_B: Float[jax.Array, " B"]) -> Float[jax.Array, " B"]:
    """Sum for each row what the rows c with `which_BB[b, c]` have. Always in the same order: no scatter."""
    return jnp.sum(jnp.where(which_BB, x_B[None, :], 0.0), axis=1)


def earned(e: Experience) -> Float[jax.Array, " B"]:
    """Each row's own rewards."""
    return jnp.sum(jnp.where(e.action_BT, e.reward_BT, 0.0), axis=1)


def of_episodes(e: Experience, own_B: Float[jax.Array, " B"]) -> Float[jax.Array, " B"]:
    """Sum a number of each row over the rows of its episode."""
    later_BB = Chains.of(e).later_BB
    return own_B + over_rows(later_BB, own_B) + over_rows(later_BB.T, own_B)


def score_of_episodes(e: Experience) -> Float[jax.Array, " B"]:
    """Rewards of each row's whole episode."""
    return of_episodes(e, earned(e))


def written_in_episodes(e: Experience) -> Float[jax.Array, " B"]:
    """Action tokens of each row's whole episode."""
    return of_episodes(e, jnp.sum(e.action_BT, axis=1, dtype=jnp.float32))


def behind(
    rule: CutRule,
    e: Experience,
    chains: Chains,
    step_BT: Bool[jax.Array, "B T"],
    value_MBT: Float[jax.Array, "M B T"],
    trace_MBT: Float[jax.Array, "M B T"],
    end_MB: Float[jax.Array, "M B"],
    gamma: float,
    lambda_: float | Float[jax.Array, " B"],
) -> Float[jax.Array, "M B"]:
    """What a row's last step still gains from the other segments of its episode, 0 for an episode of one row.

    Args:
        rule: see `GAE.cut_rule`.
        e: the rows.
        chains: how they follow each other.
        step_BT: positions that are steps in time.
        value_MBT: values at the steps.
        trace_MBT: lambda-traces of the rows on their own, where a row that another one follows ends with nothing.
        end_MB: value with which a row goes on that no other follows.
        gamma: discount.
        lambda_: of the traces, one for all rows or one a row; the rows of a chain have the same.
    """
    linked_B = chains.linked_B
    if rule == "chain":
        state_MB = _first_states(e, chains, step_BT, value_MBT, trace_MBT, end_MB, gamma, lambda_)
        return jnp.where(linked_B[None], gamma * state_MB[:, chains.next_B], 0.0)
    gained_MB = earned(e)[None] + gamma * end_MB
    later_MB = jax.vmap(over_rows, (None, 0))(chains.later_BB, gained_MB)
    later_MB = jnp.where(linked_B[None], later_MB, 0.0)
    return later_MB if rule == "scale" else later_MB + over_rows(chains.later_BB.T, earned(e))[None]


def _first_states(
    e: Experience,
    chains: Chains,
    step_BT: Bool[jax.Array, "B T"],
    value_MBT: Float[jax.Array, "M B T"],
    trace_MBT: Float[jax.Array, "M B T"],
    end_MB: Float[jax.Array, "M B"],
    gamma: float,
    lambda_: float | Float[jax.Array, " B"],
) -> Float[jax.Array, "M B"]:
    """V + lambda trace in the state of each row's first action, with all that follows in later rows.

    Affine in the same number of the next row, because what arrives behind a row reaches its first step times
    (gamma lambda)^(steps after it). A row without an action is no state: it hands on what it is given.
    """
    acts_B = e.action_BT.any(axis=1)
    first_B = jnp.argmax(e.action_BT, axis=1)
    rows_B = jnp.arange(len(first_B))
    here_MB = value_MBT[:, rows_B, first_B] + beside(lambda_, 0) * trace_MBT[:, rows_B, first_B]
    steps_B = jnp.sum(step_BT & (jnp.arange(step_BT.shape[1])[None, :] >= first_B[:, None]), axis=1)
    own_MB = jnp.where(acts_B[None], here_MB, end_MB)
    passed_B = jnp.where(acts_B, power(gamma * lambda_, steps_B), 1.0)

    def body(_: jax.Array, state_MB: jax.Array) -> jax.Array:
        return jnp.where(chains.linked_B[None], own_MB + passed_B[None] * state_MB[:, chains.next_B], own_MB)

    # After n rounds the n + 1 last rows of every chain are right.
    return jax.lax.fori_loop(0, chains.depth, body, own_MB)


def beside(lambda_: float | Float[jax.Array, " B"], *axes: int) -> float | jax.Array:
    """Give an array of one number a row further axes of length 1; one number for all rows needs none."""
    return lambda_ if isinstance(lambda_, float) else jnp.expand_dims(lambda_, axes)


def power(base: float | jax.Array, exponent: jax.Array) -> jax.Array:
    """`base ** exponent` for counts, in float32; exactly 1 for base 1 and for exponent 0."""
    return jnp.power(jnp.asarray(base, jnp.float32), exponent.astype(jnp.float32))
