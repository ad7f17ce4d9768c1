"""The training loop's body, for commands and notebooks: `Trainer(config).step()`."""

from ppojax.trainer.trainer import StepOut, Trainer

__all__ = ["StepOut", "Trainer"]
