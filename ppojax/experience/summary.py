"""What a step's experience says about the policy and the critic, as numbers for the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppojax.advantages.chain import Chains
from ppojax.transfer import fetch
from ppojax.types import Batch, Ending, Row, episodes_of

# Of an experience, for `advantage_metrics`: of many processes each is sent whole what the others have.
READ = ("action_BT", "reward_BT", "value_MBT", "ending_B", "valid_B", "episode_B", "segment_B")


def rollout_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Rewards, lengths and endings of the episodes that count; a failed one is only counted as failed.

    The rows of an episode that was cut count together: what was written and earned adds up, the prompt is the first
    row's, the ending the last one's. `compaction/*` is left out where no episode has more than one row.
    """
    episodes = episodes_of(rows)
    good = [episode for episode in episodes if episode[-1].ending != Ending.ERROR]
    if not good:
        return {"error/frac": 1.0}
    last = [episode[-1] for episode in good]
    score = np.array([sum(row.reward.sum() for row in episode) for episode in good])
    written = np.array([sum(row.action.sum() for row in episode) for episode in good])
    prompt = np.array([episode[0].action.argmax() for episode in good])
    turns = np.array([sum(_turns(row) for row in episode) for episode in good])
    groups: dict[int, list[float]] = {}
    for row, reward in zip(last, score, strict=True):
        groups.setdefault(row.group, []).append(float(reward))
    same = [max(g) - min(g) < 1e-6 for g in groups.values() if len(g) > 1]
    limited = [episode[-1].ending == Ending.TRUNCATED or any(row.clipped for row in episode) for episode in good]
    return {
        "reward/mean": float(score.mean()),
        "reward/std": float(score.std()),
        "reward/max": float(score.max()),
        "reward/min": float(score.min()),
        "reward/success": float(np.mean([bool(row.info.get("success", False)) for row in last])),
        "reward/frac_zero_std": float(np.mean(same)) if same else 0.0,
        "response_length/mean": float(written.mean()),
        "response_length/max": float(written.max()),
        "response_length/min": float(written.min()),
        "response_length/clip_ratio": float(np.mean(limited)),
        "prompt_length/mean": float(prompt.mean()),
        "prompt_length/max": float(prompt.max()),
        "prompt_length/min": float(prompt.min()),
        "num_turns/mean": float(turns.mean()),
        "error/frac": 1.0 - len(good) / len(episodes),
        **_distinct([row for episode in good for row in episode]),
        **_compaction(np.array([len(episode) for episode in good])),
        **_parts(last),
    }


def staleness_metrics(rows: Sequence[Row], number: int) -> dict[str, float]:
    """Training steps between the weights that drew a token and those after `number` steps, over action tokens."""
    tokens = np.array([row.action.sum() for row in rows])
    age = number - np.array([row.version for row in rows])
    return {"staleness/mean": float((tokens * age).sum() / max(tokens.sum(), 1)), "staleness/max": float(age.max())}


def _turns(row: Row) -> int:
    """Turns that the policy wrote in a row, a summary among them."""
    return int((np.diff(row.action.astype(int), prepend=0) == 1).sum())


def _distinct(rows: Sequence[Row]) -> dict[str, float]:
    """Different pairs of successive tokens that the policy wrote, over all such pairs of the step: distinct-2 of arXiv
    1510.03055. It falls where answers become alike, and with their number, so compare steps of one size."""
    pairs = []
    for row in rows:
        first = row.token[:-1].astype(np.int64)[row.action[:-1] & row.action[1:]]
        pairs.append((first << 32) | row.token[1:].astype(np.int64)[row.action[:-1] & row.action[1:]])
    pair = np.concatenate(pairs)
    return {"response/distinct_2": len(np.unique(pair)) / len(pair)} if len(pair) else {}


def _compaction(segments: np.ndarray) -> dict[str, float]:
    """Rows an episode, and the share of episodes with more than one."""
    if segments.max() == 1:
        return {}
    return {
        "compaction/segments_mean": float(segments.mean()),
        "compaction/segments_max": float(segments.max()),
        "compaction/frac": float(np.mean(segments > 1)),
    }


def _parts(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of each part of a reward, and of how often it failed, over the rows whose info has it."""
    names = sorted({name for row in rows for name in row.info if name.startswith(("reward/", "failed/"))})
    return {name: float(np.mean([row.info[name] for row in rows if name in row.info])) for name in names}


def to_go(reward_BT: np.ndarray, action_BT: np.ndarray, gamma: float, *, chains: Chains | None = None) -> np.ndarray:
    """Monte-Carlo return from each action on: G_t = r_t + gamma G_next, next running over action tokens.

    With `chains`, the next action of a row that was cut is the first one of the row that goes on.
    """
    out, later = np.zeros_like(reward_BT), np.zeros(len(reward_BT), np.float32)
    for t in reversed(range(reward_BT.shape[1])):
        later = np.where(action_BT[:, t], reward_BT[:, t] + gamma * later, later)
        out[:, t] = later
    if chains is None or not chains.linked_B.any():
        return out
    weight_BT = np.float32(gamma) ** np.cumsum(action_BT[:, ::-1], axis=1)[:, ::-1].astype(np.float32)
    after_B = np.zeros_like(later)
    for _ in range(int(chains.depth)):
        first_B = out[:, 0] + weight_BT[:, 0] * after_B
        after_B = np.where(chains.linked_B, first_B[chains.next_B], np.float32(0))
    return out + weight_BT * after_B[:, None]


def advantage_metrics(batch: Batch, gamma: float) -> dict[str, float]:
    """Advantages, values and returns over action tokens.

    `critic/vf_explained_var` is 1 - Var[G - V] / Var[G] with G the Monte-Carlo return over all rows of an episode, not
    the bootstrapped target (which contains V itself and flatters it); V is the mean over critics, taken before this
    step's update. It is left out when returns do not vary. `critic/value_std` is the deviation between critics,
    averaged over tokens.
    """
    whole = batch.experience._asdict()
    read, advantage_BT = fetch(({name: whole[name] for name in READ}, batch.advantage_BT))
    e: Any = batch.experience._replace(**read)
    action_BT = e.action_BT
    if not action_BT.any():
        return {}
    advantage = advantage_BT[action_BT]
    out = {
        "critic/advantages/mean": float(advantage.mean()),
        "critic/advantages/max": float(advantage.max()),
        "critic/advantages/min": float(advantage.min()),
    }
    returns = to_go(e.reward_BT, action_BT, gamma, chains=Chains.of(e))[action_BT].astype(np.float64)
    out |= _spread("critic/returns", returns)
    if e.value_MBT is not None:
        value = e.value_MBT.mean(0)[action_BT].astype(np.float64)
        out |= _spread("critic/values", value)
        out["critic/values/std"] = float(value.std())
        if len(e.value_MBT) > 1:
            out["critic/value_std"] = float(e.value_MBT.std(0)[action_BT].mean())
        out["critic/value_error/rms"] = float(np.sqrt(np.mean((returns - value) ** 2)))
        if returns.var() > 1e-8:
            out["critic/vf_explained_var"] = float(1 - (returns - value).var() / returns.var())
    return out


def _spread(name: str, x: np.ndarray) -> dict[str, float]:
    return {f"{name}/mean": float(x.mean()), f"{name}/max": float(x.max()), f"{name}/min": float(x.min())}
