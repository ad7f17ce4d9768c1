"""Low-rank adapters: y = x W + scale (x a) b, with W frozen (LoRA, arXiv 2106.09685, section 4.1).

Where a model has adapters, its parameters are one tree of which some leaves are trained and the others frozen:
`{"embed", "layers": {"q", ..., "lora": {"q": {"a", "b"}, ...}}, "norm"}`. `split` takes the two apart, `combine` puts
them together again, `merge` folds the adapters into the matrices.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from ppojax.component import Component
from ppojax.lazy import jax, jnp

Target = Literal[
    "q", "k", "v", "o", "gate", "up", "down",
    "q_a", "q_b", "kv_a", "kv_b",
    "shared_gate", "shared_up", "shared_down",
]  # fmt: skip
TRAINED = ("lora", "value_head")  # what is not frozen in a model with adapters


class LoRAConfig(Component):
    """Adapters on the matrices of attention and of the MLP that every token meets; all else is frozen."""

    rank: int = Field(default=32, ge=1, description="rank r of each adapter")
    alpha: float = Field(default=64.0, gt=0, description="adapters count alpha / rank times")
    rslora: bool = Field(default=False, description="alpha / sqrt(rank) times instead (arXiv 2312.03732)")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of an adapter's inputs that an update leaves out; sampling uses all"
    )
    targets: tuple[Target, ...] | None = Field(
        default=None, min_length=1, description="matrices that get an adapter, by name; null: all that can have one"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _no_experts(cls, targets: Any) -> Any:
        for name in targets or ():
            if str(name).startswith(("expert", "router")):
                raise ValueError(f"{name} cannot have an adapter: experts and their routers stay frozen")
        return targets

    @property
    def scale(self) -> float:
        """Factor on (x a) b."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def fits(self, other: LoRAConfig | None) -> bool:
        """Whether adapters of this kind are the other's too; what an update drops is no part of them."""
        return other is not None and other.model_copy(update={"dropout": self.dropout}) == self


def split(params: dict[str, Any], lora: LoRAConfig | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take parameters apart into what is trained and what is frozen; without adapters everything is trained."""
    if lora is None:
        return params, {}
    trained, frozen = {}, {}
    for name, leaf in params.items():
        if name in TRAINED:
            trained[name] = leaf
        elif isinstance(leaf, dict):
            parts = split(leaf, lora)
            trained |= {name: parts[0]} if parts[0] else {}
            frozen |= {name: parts[1]} if parts[1] else {}
        else:
            frozen[name] = leaf
    return trained, frozen


def combine(frozen: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Put the two halves of `split` together."""
    both = {**frozen, **trained}
    for name in frozen.keys() & trained.keys():
        both[name] = combine(frozen[name], trained[name])
    return both


def merge(params: dict[str, Any], lora: LoRAConfig, dtype: str | None = None) -> dict[str, Any]:
    """Fold each adapter into its matrix, W + scale a b, in float32 and then in `dtype`, W's own when that is None."""
    merged = {}
    for name, leaf in params.items():
        if name != "lora":
            merged[name] = merge(leaf, lora, dtype) if isinstance(leaf, dict) else leaf
    for name, pair in params.get("lora", {}).items():
        product = jnp.matmul(*(pair[x].astype("float32") for x in "ab"), precision=jax.lax.Precision.HIGHEST)
        w = merged[name]
        merged[name] = (w.astype("float32") + lora.scale * product).astype(dtype or w.dtype)
    return merged


def row_keys(key: jax.Array, episode_B: jax.Array, segment_B: jax.Array) -> jax.Array:
    """The dropout key of each row, from what it is and not where it lies: microbatches and meshes change nothing."""
    return jax.vmap(lambda e, s: jax.random.fold_in(jax.random.fold_in(key, e), s))(episode_B, segment_B)


def drop(x: jax.Array, key_B: jax.Array, name: str, rate: float) -> jax.Array:
    """Leave out inputs of the adapter called `name`: x m / (1 - rate), with m = 1 of probability 1 - rate, else 0.

    Each row of `x` `[B, ...]` has its key, and each matrix its own m (inverted dropout, arXiv 1207.0580; as in LoRA's
    code it acts on the adapter alone, so that x W sees all of x).
    """
    which = get_args(Target).index(name)
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, which), 1 - rate, x.shape[1:]))(key_B)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def fingerprint(frozen: dict[str, Any]) -> str:
    """Hash frozen weights: names, shapes, types and every bit, wherever they lie.

    Of each array the sum of its bits times an odd number that depends on the place is taken, modulo 2^32: integers,
    so that the order of summation and the mesh do not matter. It tells an accident, not an attack.
    """
    digest = hashlib.sha256()
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_sum_of_bits, tree))(frozen))
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
    digest.update(repr([int(x) for x in jax.tree.leaves(sums)]).encode())
    return digest.hexdigest()[:16]


def _sum_of_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype("uint32")
    place = jnp.zeros(x.shape, "uint32")
    for axis in range(x.ndim):
        place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota("uint32", x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype="uint32")
