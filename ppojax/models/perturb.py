"""Learnable Gaussian noise on the input of every block, in the update only (ALP, arXiv 2603.19470).

The deviations are trained beside the policy's weights, in a train state's `params["log_sigma"]`, and are no part of a
model: what samples, scores, evaluates or exports gets the weights that `apart` leaves.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field

from ppojax.component import Component
from ppojax.errors import ConfigError
from ppojax.lazy import jax, jnp
from ppojax.models.lora import row_keys
from ppojax.models.spec import DecoderSpec
from ppojax.types import Experience

NAME = "log_sigma"


class Perturb(Component):
    """Noise h + sigma s eps, eps ~ N(0, 1), on the hidden state h that a block reads; log sigma is trained.

    The gradient reaches sigma through the noise (reparametrisation, arXiv 1312.6114). The paper's deviations are not in
    what we could read of it: those below are ours.
    """

    initial: float = Field(default=0.01, gt=0, description="standard deviation sigma that every block starts with")
    relative: bool = Field(
        default=True,
        description="sigma counts in root mean squares of each token's hidden state, the unit of what a block's norm "
        "hands on; false: as it is",
    )
    per: Literal["block", "channel"] = Field(
        default="block", description="what has a sigma of its own: each block, or each channel of each block"
    )
    blocks: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="blocks whose input is perturbed, from 0 on; null: all of them"
    )
    learning_rate: float = Field(
        default=1e-3, ge=0, description="of log sigma, constant: about the share by which an update may change a sigma"
    )

    def check(self, spec: DecoderSpec) -> None:
        """Raise ConfigError when a block is named that the model has not."""
        wrong = [n for n in self.blocks or () if not 0 <= n < spec.layers]
        if wrong:
            raise ConfigError(
                f"actor.perturb.blocks: this model has no block {', '.join(map(str, wrong))}; it has 0 to "
                f"{spec.layers - 1}"
            )

    def start(self, spec: DecoderSpec) -> jax.Array:
        """log sigma before the first update, float32 `[L]` or `[L, D]`; of no meaning for blocks without noise."""
        shape = (spec.layers,) if self.per == "block" else (spec.layers, spec.width)
        return jnp.full(shape, jnp.log(jnp.float32(self.initial)))

    def sigma(self, log_sigma: jax.Array) -> jax.Array:
        """sigma of every block, 0 where there is no noise."""
        if self.blocks is None:
            return jnp.exp(log_sigma)
        noisy = jnp.zeros(len(log_sigma), bool).at[jnp.asarray(self.blocks)].set(True)
        return jnp.where(noisy.reshape((-1,) + (1,) * (log_sigma.ndim - 1)), jnp.exp(log_sigma), 0.0)


class Noise(NamedTuple):
    """What the blocks of one pass add."""

    sigma: jax.Array  # [L] or [L, D]
    key_BT: jax.Array  # of each token; every block folds its number in
    relative: bool


class Perturbation(NamedTuple):
    """What one update adds."""

    settings: Perturb
    log_sigma: jax.Array
    key: jax.Array  # of the update

    def noise(self, rows: Experience, position_BT: jax.Array) -> Noise:
        """The noise of tokens at these positions of their rows; each row has its own."""
        return self._with(token_keys(self.key, rows.episode_B, rows.segment_B, position_BT))

    def shared(self, rows: Experience, position_PT: jax.Array, position_BR: jax.Array) -> Noise:
        """The noise of prompts with their group's first row's, and of the rows of the group behind each."""
        P, group = position_PT.shape[0], len(position_BR) // len(position_PT)
        prompt = token_keys(self.key, rows.episode_B[::group], rows.segment_B[::group], position_PT)
        own = token_keys(self.key, rows.episode_B, rows.segment_B, position_BR)
        return self._with(jnp.concatenate([prompt, own.reshape(P, -1)], axis=1))

    def _with(self, key_BT: jax.Array) -> Noise:
        return Noise(self.settings.sigma(self.log_sigma), key_BT, self.settings.relative)


def perturbation_of(settings: Perturb | None, params: dict[str, Any], key: jax.Array | None) -> Perturbation | None:
    """What an update adds with the deviations among `params`; nothing without settings, or without a key."""
    return None if settings is None or key is None else Perturbation(settings, params[NAME], key)


def apart(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take what a train state holds apart into a model's weights and the deviations, which may be none."""
    weights = {name: leaf for name, leaf in params.items() if name != NAME}
    return weights, {name: leaf for name, leaf in params.items() if name == NAME}


def token_keys(key: jax.Array, episode_B: jax.Array, segment_B: jax.Array, position_BT: jax.Array) -> jax.Array:
    """The key of each token, from its episode, segment and position: where its row lies changes nothing."""
    key_B = row_keys(key, episode_B, segment_B)
    return jax.vmap(lambda key, row_T: jax.vmap(lambda t: jax.random.fold_in(key, t))(row_T))(key_B, position_BT)


def perturbed(x_BTD: jax.Array, sigma: jax.Array, key_BT: jax.Array, block: jax.Array, relative: bool) -> jax.Array:
    """x + sigma s eps, computed in float32; s = sg(rms(x)) of each token if `relative`, else 1."""
    D, x32 = x_BTD.shape[-1], x_BTD.astype(jnp.float32)
    draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, block), (D,), jnp.float32)))
    step = jnp.broadcast_to(sigma, (1, 1, D)) * draw(key_BT)
    if relative:
        step = step * jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True)))
    return (x32 + step).astype(x_BTD.dtype)
