"""Inputs and the float64 oracle that every implementation of the token statistics is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 16
OTHER = 12  # the reference's width
K = 5
STATISTICS = ("logp", "entropy", "kl", "reverse_kl", "tv", "topk_logp")
EVERY = {"entropy": True, "kl": True, "reverse_kl": True, "tv": True}


class Case(dict):
    """Arrays by name: hidden, head, target, other, other_head, ids, and a cotangent for each statistic."""


def case(rows: int, vocabulary: int, largest: float = 3.0, seed: int = 0) -> Case:
    """A policy and a reference whose logits reach +-`largest`; ids with a filler in each row; cotangents."""
    rng = np.random.default_rng(seed)

    def pair(width: int) -> tuple[np.ndarray, np.ndarray]:
        hidden, head = rng.normal(size=(rows, width)), rng.normal(size=(vocabulary, width))
        peak = max(np.abs(hidden[i : i + 64] @ head.T).max() for i in range(0, rows, 64))
        return (hidden * (largest / peak)).astype(np.float32), head.astype(np.float32)

    hidden, head = pair(WIDTH)
    other, other_head = pair(OTHER)
    ids = rng.integers(0, vocabulary, (rows, K)).astype(np.int32)
    ids[:, -1] = -1
    weights = {name: rng.normal(size=rows).astype(np.float32) for name in STATISTICS}
    weights["topk_logp"] = rng.normal(size=(rows, K)).astype(np.float32)
    target = rng.integers(0, vocabulary, rows).astype(np.int32)
    return Case(hidden=hidden, head=head, target=target, other=other, other_head=other_head, ids=ids, weights=weights)


def exact(c: Case, temperature: float = 1.0, softcap: float | None = None, tie: float = 2e-6) -> dict[str, np.ndarray]:
    """Every statistic, and the gradients of the sum of weights x statistics, in float64.

    The gradient is assembled from the Jacobian of the softmax and d statistic / d p, not from the closed form that the
    library uses.
    """
    hidden, head, other, other_head = (np.asarray(c[n], np.float64) for n in ("hidden", "head", "other", "other_head"))
    raw, z, log_p = _log_softmax(hidden, head, temperature, softcap)
    log_q = _log_softmax(other, other_head, temperature, softcap)[2]
    p, q, rows = np.exp(log_p), np.exp(log_q), np.arange(len(z))
    ids, w = c["ids"], {n: np.asarray(x, np.float64) for n, x in c["weights"].items()}
    named = ids >= 0
    out = {
        "logp": log_p[rows, c["target"]],
        "entropy": -(p * log_p).sum(1),
        "kl": (p * (log_p - log_q)).sum(1),
        "reverse_kl": (q * (log_q - log_p)).sum(1),
        "tv": 0.5 * np.abs(p - q).sum(1),
        "topk_logp": np.where(named, np.take_along_axis(log_p, np.maximum(ids, 0), 1), 0.0),
    }
    # d loss / d log p, with the sum over p's own constraint taken by the Jacobian below.
    d = -w["entropy"][:, None] * p * (log_p + 1) + w["kl"][:, None] * p * (log_p - log_q + 1)
    d += -w["reverse_kl"][:, None] * q + w["tv"][:, None] * 0.5 * _side(log_p - log_q, tie) * p
    d[rows, c["target"]] += w["logp"]
    np.add.at(d, (rows[:, None], np.maximum(ids, 0)), np.where(named, w["topk_logp"], 0.0))
    d_z = d - p * d.sum(1, keepdims=True)
    slope = 1.0 if softcap is None else 1 - np.tanh(raw / softcap) ** 2
    d_z = d_z * slope / temperature
    return out | {"d_hidden": d_z @ head, "d_head": d_z.T @ hidden}


def _side(gap: np.ndarray, tie: float) -> np.ndarray:
    """The slope of |p - q|; float32 cannot tell sides below some 2e-6, where the library takes neither."""
    return np.where(np.abs(gap) < tie, 0.0, np.sign(gap))


def _log_softmax(
    hidden: np.ndarray, head: np.ndarray, temperature: float, softcap: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    raw = hidden @ head.T
    z = (raw if softcap is None else softcap * np.tanh(raw / softcap)) / temperature
    log_p = z - z.max(1, keepdims=True)
    return raw, z, log_p - np.log(np.exp(log_p).sum(1, keepdims=True))


def run(function: Callable[..., Any], c: Case, **settings: Any) -> dict[str, jax.Array]:
    """Values and gradients as `exact` returns them; only the statistics that the settings ask for."""
    weights = {n: jnp.asarray(x) for n, x in c["weights"].items()}
    fixed = {"reference": (jnp.asarray(c["other"]), jnp.asarray(c["other_head"])), "topk_id_NK": jnp.asarray(c["ids"])}

    def objective(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        stats = function(hidden, head, jnp.asarray(c["target"]), **(fixed | settings))
        found = {n: x for n, x in stats._asdict().items() if x is not None}
        return sum((jnp.sum(weights[n] * x) for n, x in found.items()), jnp.float32(0)), found

    arrays = jnp.asarray(c["hidden"]), jnp.asarray(c["head"])
    (_, found), (d_hidden, d_head) = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(*arrays)
    return found | {"d_hidden": d_hidden, "d_head": d_head}


def compare(found: dict[str, jax.Array], expected: dict[str, np.ndarray], **tolerance: float) -> None:
    """Every name that was found is close to what is expected."""
    for name, value in found.items():
        np.testing.assert_allclose(np.asarray(value, np.float64), expected[name], err_msg=name, **tolerance)
