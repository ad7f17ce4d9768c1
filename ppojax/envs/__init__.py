"""Environments: what the policy is asked, what its tools answer, and how it is graded. They never import jax."""

from typing import Annotated

from pydantic import Field

from ppojax.envs.base import Env, Reset, Step, Task
from ppojax.envs.calculator import Calculator

# A second environment makes this a union with discriminator="type"; pydantic refuses a discriminator for one member.
EnvConfig = Annotated[Calculator, Field(description="environment")]

__all__ = ["Calculator", "Env", "EnvConfig", "Reset", "Step", "Task"]
