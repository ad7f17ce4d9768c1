"""Success on held-out tasks: greedy, and by sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from ppojax.envs import Task
from ppojax.models.forward import Params
from ppojax.rollout.collect import Collector
from ppojax.trainer.build import greedy, plain
from ppojax.types import Ending, Row


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95% by default (Wilson 1927; stays inside [0, 1])."""
    if trials == 0:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Mean over tasks of 1 - C(n - c, k) / C(n, k), the unbiased estimate (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        correct: successes c of each task among n = `samples`.
        samples: n, at least k.
        k: attempts of which one must succeed.
    """
    assert 1 <= k <= samples
    missed = [math.comb(samples - c, k) / math.comb(samples, k) for c in correct]
    return 1.0 - sum(missed) / len(missed)


def evaluate_greedy(
    collector: Collector, params: Params, tasks: Sequence[Task], key: jax.Array
) -> tuple[dict[str, float], Sequence[Row]]:
    """Success of the most likely answer, with its interval, and the mean reward; a failed episode has neither."""
    played = greedy(collector)(params, tasks, key)
    episodes = played.episodes()
    good = [episode for episode in episodes if not _failed(episode)]
    successes = sum(map(_success, good))
    low, high = wilson(successes, len(episodes))
    metrics = {
        "val/success": successes / len(episodes),
        "val/success_low": low,
        "val/success_high": high,
        "val/reward/mean": float(sum(row.reward.sum() for episode in good for row in episode) / len(episodes)),
        "val/tasks": float(len(episodes)),
        "val/error_frac": 1.0 - len(good) / len(episodes),
    }
    return metrics, played.rows


def evaluate_samples(
    collector: Collector, params: Params, tasks: Sequence[Task], key: jax.Array, samples: int
) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... up to `samples` draws a task, at the sampling temperature."""
    many = replace(plain(collector), group_size=samples)
    played = many(params, tasks, key)
    success = np.array([_success(episode) for episode in played.episodes()]).reshape(-1, samples)
    correct = [int(c) for c in success.sum(1)]
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {f"val/pass@{k}": pass_at_k(correct, samples, k) for k in powers}


def _failed(episode: Sequence[Row]) -> bool:
    return episode[-1].ending == Ending.ERROR


def _success(episode: Sequence[Row]) -> bool:
    return not _failed(episode) and bool(episode[-1].info.get("success", False))
