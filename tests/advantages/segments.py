"""Random chains of rows, and GAE over them as one would write it on paper."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ppojax.types import Ending, Experience
from small_batch import experience_of

B, T, M = 12, 24, 2  # of all random batches, so that one program takes them all


@dataclass
class Segment:
    """A row; `value` has one more state than there are tokens, the one that is left at the end."""

    action: np.ndarray
    reward: np.ndarray
    value: np.ndarray  # [M, n + 1]
    episode: int
    segment: int
    ending: Ending
    valid: bool = True


def batch_of(rows: list[Segment], size: tuple[int, int] = (B, T)) -> Experience:
    """Pad rows with NaN values, and fill the batch up as `pack` does."""
    count, tokens = size
    action, reward = np.zeros(size, bool), np.zeros(size)
    value = np.full((len(rows[0].value), *size), np.nan)
    for b, row in enumerate(rows):
        n = len(row.action)
        action[b, :n], reward[b, :n] = row.action & row.valid, row.reward
        value[:, b, : n + 1] = row.value[:, : tokens if n == tokens else n + 1]
    rest = count - len(rows)
    e = experience_of(
        action,
        reward=reward,
        length=[len(row.action) for row in rows] + [0] * rest,
        ending=[row.ending for row in rows] + [Ending.ERROR] * rest,
        valid=[row.valid for row in rows] + [False] * rest,
        value=value,
    )
    return e._replace(
        episode_B=jnp.asarray([row.episode for row in rows] + [-1] * rest, jnp.int32),
        segment_B=jnp.asarray([row.segment for row in rows] + [0] * rest, jnp.int32),
    )


def random_segment(rng: np.random.Generator, episode: int, segment: int, ending: Ending) -> Segment:
    """Mostly a few tokens with a prompt; sometimes one token, or no action at all."""
    n = int(rng.integers(1, 8))
    action = np.arange(n) >= rng.integers(0, n)
    action &= rng.random(n) < rng.choice([0.0, 0.6, 1.0], p=[0.15, 0.5, 0.35])
    reward = np.where(action, rng.normal(size=n) * (rng.random(n) < 0.5), 0)
    return Segment(action, reward, rng.normal(size=(M, n + 1)), episode, segment, ending)


def random_rows(seed: int, *, gaps: bool = True) -> list[Segment]:
    """Chains of 1 to 4 segments in random order; some failed, some without their end or with a gap."""
    rng = np.random.default_rng(seed)
    rows: list[Segment] = []
    for episode in rng.permutation(20)[:7]:
        count = int(rng.integers(1, 5))
        last = Ending(int(rng.integers(0, 2)))
        chain = [random_segment(rng, int(episode), s, last if s == count - 1 else Ending.CUT) for s in range(count)]
        if rng.random() < 0.15:
            for row in chain:
                row.ending, row.valid = Ending.ERROR, False
        elif gaps and count > 1 and rng.random() < 0.3:
            chain.pop(int(rng.integers(1, count)))
        if len(rows) + len(chain) <= B:
            rows += chain
    return [rows[i] for i in rng.permutation(len(rows))]


def loop(
    rows: list[Segment],
    mask_rule: str,
    cut_rule: str,
    truncation: str,
    gamma: float,
    lambdas: tuple,
    alpha: float | None = None,
) -> tuple:
    """Float64: an episode's steps are listed one after the other, then walked backwards. With `alpha` the policy's
    lambda is 1 - 1/(alpha L), no less than 0."""
    advantage, target = np.zeros((B, T)), np.zeros((M, B, T))

    def end(row: Segment) -> np.ndarray:
        on = row.ending == Ending.CUT or (row.ending == Ending.TRUNCATED and truncation == "bootstrap")
        return row.value[:, -1] if on else np.zeros(M)

    def after_cut(b: int) -> int | None:
        place = rows[b].episode, rows[b].segment + 1
        found = [c for c, row in enumerate(rows) if row.valid and (row.episode, row.segment) == place]
        return found[0] if found and rows[b].ending == Ending.CUT else None

    def steps(b: int) -> list[tuple[int, int]]:
        action = rows[b].action
        if not action.any():
            return []
        inside = range(int(action.argmax()), len(action))
        return [(b, t) for t in inside if mask_rule != "skip" or action[t]]

    def walk(where: list, after: np.ndarray, extra: float | np.ndarray, lambda_: float, mean: bool) -> dict:
        """Traces at the steps; `extra` arrives behind the last one."""
        out, trace, following = {}, np.zeros(M), after
        if mean:
            following, extra = np.full(M, after.mean()), np.mean(extra)
        for i, (b, t) in enumerate(reversed(where)):
            now = rows[b].value[:, t]
            now = np.full(M, now.mean()) if mean else now
            now = np.zeros(M) if mask_rule == "zero" and not rows[b].action[t] else now
            reward = rows[b].reward[t] + (extra if i == 0 else 0)
            trace = reward + gamma * following - now + gamma * lambda_ * trace
            out[b, t], following = trace, now
        return out

    for b, row in enumerate(rows):
        if not row.valid:
            continue
        mates = [c for c, other in enumerate(rows) if other.valid and other.episode == row.episode]
        later = [c for c in mates if rows[c].segment > row.segment]
        earlier = [c for c in mates if rows[c].segment < row.segment]
        chain = [b]
        while (following := after_cut(chain[-1])) is not None:
            chain.append(following)
        extra: float | np.ndarray = 0.0
        if cut_rule == "chain":
            where, after = [step for c in chain for step in steps(c)], end(rows[chain[-1]])
        else:
            where, after = steps(b), end(row)
            if len(chain) > 1:
                after = np.zeros(M)
                ends = [end(rows[c]) for c in later if after_cut(c) is None]
                extra = sum(rows[c].reward.sum() for c in later) + gamma * sum(ends)
            if cut_rule == "broadcast":
                extra = extra + sum(rows[c].reward.sum() for c in earlier)
        dropped = truncation == "mask_out" and Ending.TRUNCATED in [rows[c].ending for c in [b, *later]]
        lambda_policy = lambdas[0]
        if alpha is not None:
            count = sum(rows[c].action.sum() for c in (mates if cut_rule == "chain" else [b]))
            lambda_policy = max(1 - 1 / (alpha * count), 0) if count else 0
        shrink = (gamma * lambda_policy) ** sum(rows[c].action.sum() for c in later) if cut_rule == "scale" else 1.0
        policy = walk(where, after, extra, lambda_policy, mean=True)
        critics = walk(where, after, extra, lambdas[1], mean=False)
        for t in np.flatnonzero(row.action):
            target[:, b, t] = row.value[:, t]
            if not dropped:
                advantage[b, t] = shrink * policy[b, t][0]
                target[:, b, t] += critics[b, t]
    return advantage, target


def join(chain: list[Segment], episode: int, gap: int) -> tuple[Segment, list[int]]:
    """The uncut episode, without the prompts of all segments; and where a token 0 of each would lie in it."""
    action, reward, value, places = [], [], [], []
    for row in chain:
        first = int(row.action.argmax()) if row.action.any() else len(row.action)
        places.append(sum(map(len, action)) - first)
        padding = [0] * gap
        action.append([*row.action[first:], *padding])
        reward.append([*row.reward[first:], *padding])
        value.append(np.concatenate([row.value[:, first:-1], np.full((M, gap), 50.0)], axis=1))
    value.append(chain[-1].value[:, -1:])
    row = Segment(
        np.concatenate(action).astype(bool),
        np.concatenate(reward),
        np.concatenate(value, axis=1),
        episode,
        0,
        chain[-1].ending,
    )
    return row, places
