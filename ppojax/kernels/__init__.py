"""Statistics of the next-token distribution, over the whole vocabulary."""

from ppojax.kernels.api import Implementation, token_stats

__all__ = ["Implementation", "token_stats"]
