"""Statistics of the next-token distribution, over the whole vocabulary."""

from ppojax.kernels.api import token_stats
from ppojax.kernels.dispatch import Implementation
from ppojax.kernels.reference import cap_logits

__all__ = ["Implementation", "cap_logits", "token_stats"]
