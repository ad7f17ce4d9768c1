"""An entropy bonus that looks after its own size."""

from __future__ import annotations

from pydantic import Field

from ppojax.component import Component


class EntropyControl(Component):
    """Raises the bonus while the entropy is under a target, and lowers it to nothing while it is over."""

    target: float = Field(default=0.2, gt=0, description="entropy of a token, nats, that is kept up")
    step: float = Field(default=0.1, gt=0, description="how far the bonus moves each training step, times its size")
    largest: float = Field(default=10.0, gt=0, description="the bonus grows to so many times its size, at most")

    def next(self, scale: float, entropy: float) -> float:
        """Move the scale of the bonus after a training step (Skywork-OR1, arXiv 2505.22312, section 4.4).

        scale + step where entropy < target, else scale - step; between 0 and `largest`.
        """
        moved = scale + self.step if entropy < self.target else scale - self.step
        return min(max(moved, 0.0), self.largest)
