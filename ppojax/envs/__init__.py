"""Environments: what the policy is asked, what its tools answer, and how it is graded. They never import jax."""

from typing import Annotated

from pydantic import Field

from ppojax.envs.base import Env, EnvSettings, Reset, Split, Step, Task
from ppojax.envs.calculator import Calculator
from ppojax.envs.jsonl import JsonLines
from ppojax.envs.tool_env import ToolEnv

EnvConfig = Annotated[Calculator | JsonLines | ToolEnv, Field(discriminator="type", description="environment")]

__all__ = ["Calculator", "Env", "EnvConfig", "EnvSettings", "JsonLines", "Reset", "Split", "Step", "Task", "ToolEnv"]
