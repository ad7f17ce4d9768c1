"""cuDNN's flash attention, where it can be used: whole rows, padded on the right, in 16 bits on a GPU.

It keeps no [T, T] scores. Padding needs no lengths here: it stands behind what is real, where causal attention does
not look. What it does not take falls back to XLA, and the reason is logged once.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import jax

from ppojax.models.spec import AttentionChoice, DecoderSpec

log = logging.getLogger(__name__)


def use_flash(choice: AttentionChoice, spec: DecoderSpec, dtype: str, *, cached: bool, packed: bool) -> bool:
    """Whether cuDNN does the attention of this call. `auto` is `cudnn` on a GPU, and `xla` elsewhere."""
    platform = jax.default_backend()
    if choice == "xla" or (choice == "auto" and platform != "gpu"):
        return False
    reason = refusal(spec, dtype, platform, cached=cached, packed=packed)
    if reason is not None:
        _say(choice, reason)
    return reason is None


def refusal(spec: DecoderSpec, dtype: str, platform: str, *, cached: bool, packed: bool) -> str | None:
    """Why cuDNN cannot do this attention, or None when it can."""
    reasons = {
        f"cuDNN runs on a GPU, this is {platform}": platform != "gpu",
        f"the compute type is {dtype}, cuDNN takes bfloat16 and float16": dtype not in ("bfloat16", "float16"),
        "the model has attention sinks": spec.sinks,
        "the model caps its scores (attention_softcap)": spec.attention_softcap is not None,
        f"keys are {spec.key_width} wide and values {spec.value_width}, cuDNN takes one width": (
            spec.key_width != spec.value_width
        ),
        f"heads are {spec.key_width} wide, cuDNN takes multiples of 8 up to 256": (
            spec.key_width % 8 != 0 or spec.key_width > 256
        ),
        "tokens stand behind a cache, cuDNN takes whole rows": cached,
        "rows are packed behind a shared prompt (update.shared_prefix), cuDNN takes plain rows": packed,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@lru_cache
def _say(choice: AttentionChoice, reason: str) -> None:
    log.warning("model.attention=%s: XLA attends instead: %s", choice, reason)


def flash(
    q_BTHF: jax.Array,
    k_BTHF: jax.Array,
    v_BTHF: jax.Array,
    *,
    scale: float,
    window: int | None,
    implementation: AttentionChoice = "cudnn",
) -> jax.Array:
    """Causal grouped-query attention of whole rows, the heads side by side `[B, T, H * F]`.

    `window` counts the tokens that are seen, the token itself among them; None: all. `implementation="xla"` computes
    the same on any device, for tests.
    """
    out_BTHF = jax.nn.dot_product_attention(
        q_BTHF,
        k_BTHF,
        v_BTHF,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="xla" if implementation == "xla" else "cudnn",
    )
    return out_BTHF.reshape(*q_BTHF.shape[:2], -1)
