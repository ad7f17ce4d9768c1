"""The root config of a training run."""

from ppojax.config.root import Config, EvalConfig, RunConfig

__all__ = ["Config", "EvalConfig", "RunConfig"]
