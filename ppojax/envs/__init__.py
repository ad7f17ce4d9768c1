"""Environments: what the policy is asked, what its tools answer, and how it is graded. They never import jax."""

from typing import Annotated

from pydantic import Field

from ppojax.envs.aviary import Aviary
from ppojax.envs.base import Env, EnvSettings, Reset, Split, Step, Task
from ppojax.envs.calculator import Calculator
from ppojax.envs.jsonl import JsonLines
from ppojax.envs.python_tool import PythonTool
from ppojax.envs.reasoning_gym import ReasoningGym
from ppojax.envs.tool_env import ToolEnv
from ppojax.envs.verifiers import Verifiers
from ppojax.envs.warehouse import Warehouse

# Another environment is a file, and its name here.
EnvConfig = Annotated[
    Aviary | Calculator | JsonLines | PythonTool | ReasoningGym | ToolEnv | Verifiers | Warehouse,
    Field(discriminator="type", description="environment"),
]

__all__ = [
    "Aviary",
    "Calculator",
    "Env",
    "EnvConfig",
    "EnvSettings",
    "JsonLines",
    "PythonTool",
    "ReasoningGym",
    "Reset",
    "Split",
    "Step",
    "Task",
    "ToolEnv",
    "Verifiers",
    "Warehouse",
]
