"""Settings of the runtime, readable without jax and orbax."""

from __future__ import annotations

from pydantic import Field

from ppojax.component import Component


class CheckpointConfig(Component):
    """When checkpoints are written, how many stay, and whether their bytes are checked."""

    every: int = Field(
        default=10, ge=0, description="Steps between checkpoints; 0 writes one only when the run ends or stops."
    )
    keep: int = Field(
        default=2, ge=1, description="Newest checkpoints that stay; with 1 there is none to fall back to."
    )
    verify: bool = Field(
        default=True,
        description="Write a sha256 of every checkpoint file and check it before loading (0.8 GB/s a core).",
    )

    def due(self, step: int) -> bool:
        """Say whether a checkpoint is written after `step` (the end of a run saves on its own account)."""
        return self.every > 0 and step % self.every == 0
