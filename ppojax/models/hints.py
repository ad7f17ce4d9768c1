"""What only the critics are shown of a row: a text before its first token.

The policy never sees it, so its gradient stays unbiased, whatever the value depends on (BPCO, arXiv 2608.23566).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ppojax.types import Experience, Layout


def with_hints(experience: Experience, layout: Layout) -> tuple[Experience, Layout]:
    """Write each row's hint before its first token: what stood at t then stands at t + hint length.

    Only what a model reads moves: tokens, lengths and prefixes. A group's rows have the same hint, so that what they
    share grows by it.
    """
    e = experience
    if e.hint_BH is None:
        return e, layout
    assert e.hint_length_B is not None
    H, T = e.hint_BH.shape[1], e.token_BT.shape[1]
    place_BT = jnp.arange(T + H, dtype=jnp.int32)[None, :] - e.hint_length_B[:, None]
    moved_BT = jnp.take_along_axis(e.token_BT, jnp.clip(place_BT, 0, T - 1), axis=1)
    hint_BT = jnp.pad(e.hint_BH, ((0, 0), (0, T)))
    longer = e._replace(
        token_BT=jnp.where(place_BT < 0, hint_BT, moved_BT),
        length_B=e.length_B + e.hint_length_B,
        prefix_B=e.prefix_B + e.hint_length_B,
        hint_BH=None,
        hint_length_B=None,
    )
    return longer, layout if layout.group == 1 else Layout(layout.group, layout.prefix + H)


def back(x_BT: jax.Array, experience: Experience) -> jax.Array:
    """Of numbers `[B, T + H, ...]` at the moved tokens those of the rows' own tokens, `[B, T, ...]`."""
    e = experience
    if e.hint_length_B is None:
        return x_BT
    place_BT = jnp.arange(e.token_BT.shape[1], dtype=jnp.int32)[None, :] + e.hint_length_B[:, None]
    return jnp.take_along_axis(x_BT, place_BT.reshape(*place_BT.shape, *(1,) * (x_BT.ndim - 2)), axis=1)
