"""A Python interpreter as a tool, in a sandbox.

With `tasks.jsonl` of lines such as `{"prompt": "What is the 100th prime?", "answer": "541"}`:

    env.type=python env.path=tasks.jsonl env.reward.numeric.weight=1
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar, Literal

from pydantic import Field

from ppojax.envs.base import Split, Task
from ppojax.envs.functions import Function, describe_function
from ppojax.envs.isolation import Limits, Result, check_sandbox, run_python
from ppojax.envs.tool_loop import ToolSettings

log = logging.getLogger(__name__)

_NOTE_CHARS = 64


class PythonTool(ToolSettings):
    """The tool `python(code)`, over questions and answers from a file.

    Each call is a process of its own in a bubblewrap sandbox: no network, a read-only system without this machine's
    users, a /tmp of its own, limits on time, memory, processes, files and output. The code finds the standard library;
    its stdin is empty; it gets back what it printed, errors included, and the value of a last line that is an
    expression. Starting one took 50 to 90 ms on two busy cores (2026-11-21).

    Without bubblewrap 0.8 there is no sandbox, and a ConfigError; `unsafe` runs the code as this user instead.
    """

    own_process: ClassVar[bool] = True

    type: Literal["python"] = Field(default="python", description="Python in a sandbox as a tool, over questions")
    memory_mb: int = Field(default=512, ge=64, description="MB a process may take, and all files in /tmp together")
    processes: int = Field(default=16, ge=4, description="processes and threads at one time; without effect for root")
    file_mb: int = Field(default=16, ge=1, description="MB a file may take")
    unsafe: bool = Field(default=False, description="run code without a sandbox: it can read, write and send anything")

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List the tasks of a split. Raises as `RecordSettings.tasks`, and ConfigError where there is no sandbox."""
        if self.unsafe:
            log.warning("env.unsafe: the policy's code runs as this user, without a sandbox")
        else:
            check_sandbox()
        return super().tasks(split, seed)

    def functions_by_name(self) -> Mapping[str, Function]:
        """Give the one function."""
        return _function(self.limits(), self.unsafe)

    def limits(self) -> Limits:
        """What one call may use."""
        kept = self.max_output_chars - _NOTE_CHARS
        return Limits(self.call_timeout_s, self.memory_mb, self.processes, self.file_mb, kept)


@cache
def _function(limits: Limits, unsafe: bool) -> Mapping[str, Function]:
    def python(code: str) -> str:
        """Run Python code, without network. Every call starts anew.

        Args:
            code: the code; gives back what it prints, and the value of its last line.
        """
        return observation(run_python(code, limits, unsafe=unsafe), limits.seconds)

    return {"python": describe_function(python, "env.type=python")}


def observation(result: Result, seconds: float) -> str:
    """Say what a run gave."""
    text = result.output.rstrip("\n")
    if result.timed_out:
        note = f"[stopped after {seconds:g} s]"
    elif result.code < 0:
        note = f"[killed by signal {-result.code}]"
    elif result.code > 1:
        note = f"[exit code {result.code}]"
    else:
        note = "" if text else "[no output]"
    return f"{text}\n{note}" if text and note else text + note
