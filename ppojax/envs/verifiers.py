"""Environments written for verifiers, version 1: its tasksets, played by its harnesses with the policy's tokens.

    env.type=verifiers env.taskset=my_taskset env.tokenizer=Qwen/Qwen3-0.6B env.renderer=qwen3

A harness is a program that asks a model over HTTP until it is done. verifiers writes its requests as tokens (with the
package `renderers`) and asks the loopback endpoint of this process for each turn, which the sampler writes: what is
trained on are those tokens, prompts and turns alike. Unlike ppojax's own tokenizer, `renderers` reads special tokens
that stand in a text (a tool's output, say) as special tokens. Needs `pip install 'ppojax[verifiers]'`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache, partial
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import Field

from ppojax.envs.base import Env, EnvSettings, Reset, Split, Step, Task, TasksByNumber, split_of
from ppojax.envs.loopback import MODEL, Asked, Line, endpoint
from ppojax.envs.user_code import load_function
from ppojax.errors import ConfigError, DataError
from ppojax.types import Messages

_NO_KEY = "PPOJAX_LOOPBACK_KEY"  # an environment variable that nobody sets: the endpoint asks for no key


class VerifiersError(RuntimeError):
    """A rollout of verifiers failed, or it left the conversation in a way that no row can follow."""


class Verifiers(EnvSettings):
    """The tasks of a verifiers taskset, in a harness.

    A request that goes on where the last turn ended is appended to the row; with any other one the episode goes on in
    another row, as after a compaction. The reward is the trace's. A rollout that fails makes the episode an error; one
    that ends at `max_turns` is truncated. `info` has the taskset's `reward/<name>`, and `success`: a reward of at least
    `success_at`. What a harness asks of sampling (temperature, tokens of a turn) is not followed.
    """

    writes_tokens: ClassVar[bool] = True

    type: Literal["verifiers"] = Field(default="verifiers", description="environments written for verifiers 1")
    taskset: str = Field(
        description="name of an installed taskset, or module:name or folder/file.py:name of what makes one"
    )
    eval_taskset: str | None = Field(
        default=None, description="the same for held-out tasks; null holds out one in eight of taskset"
    )
    harness: str = Field(default="null", description="name of a harness: one of verifiers' own, or an installed one")
    runtime: Literal["subprocess", "docker", "podman", "apptainer"] = Field(
        default="subprocess", description="where the harness runs; subprocess isolates nothing"
    )
    tokenizer: str = Field(description="folder or hub id of the tokenizer: that of model.path")
    renderer: str | None = Field(
        default=None, description="how messages are written, such as qwen3; null chooses by the tokenizer's name"
    )
    max_turns: int = Field(default=16, ge=1, description="turns an episode may take")
    turn_timeout_s: float = Field(default=300.0, gt=0, description="seconds from one turn to the next request")
    most_tasks: int = Field(default=100_000, ge=1, description="tasks that are read of a taskset, at most")
    success_at: float = Field(default=1.0, description="reward from which on an episode is a success")

    def make(self) -> Env:
        """Make an environment for one episode."""
        return VerifiersEnv(self)

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List the tasks of a split, by their numbers in the taskset; the seed is not used.

        Raises:
            ConfigError: verifiers is not installed, or a taskset or the harness cannot be made.
            DataError: one of the splits has no task.
        """
        _agent(self, "http://127.0.0.1")
        path = self.eval_taskset if split == "eval" and self.eval_taskset else self.taskset
        numbers: Sequence[int] = range(len(_tasks(path, self.most_tasks)))
        if self.eval_taskset is None:
            numbers = [n for n in numbers if split_of(str(n)) == split]
        if not numbers:
            raise DataError(f"{path}: no task to {split}, expected some; give env.eval_taskset, or more tasks")
        return TasksByNumber(partial(_task, path, numbers), range(len(numbers)))


class VerifiersEnv:
    """One episode of `Verifiers`: a rollout in another thread, which asks for its turns."""

    def __init__(self, config: Verifiers) -> None:
        self._config = config
        self._line: Line = endpoint().open()
        self._rollout: Future[None] | None = None
        self._asked: Asked | None = None
        self._turns = 0

    def reset(self, task: Task) -> Reset:
        """Start the rollout, and wait for its first request."""
        theirs = _tasks(task.data["taskset"], self._config.most_tasks)[task.data["number"]]
        self._rollout = asyncio.run_coroutine_threadsafe(self._play(theirs), _loop())
        event = self._line.next(self._config.turn_timeout_s)
        if not isinstance(event, Asked):
            raise VerifiersError(f"the rollout ended before its first turn: {_fault(event)}")
        self._asked = event
        return Reset([{"role": "user", "content": theirs.data.prompt_text}], ids=event.ids)

    def step(self, message: dict[str, Any]) -> Step:
        """Hand the turn over, and wait for the next request or the end. Raises VerifiersError, TimeoutError."""
        assert self._asked is not None, "reset comes before step"
        self._turns += 1
        ids: list[int] = message["token_ids"]
        before = [*self._asked.ids, *ids]
        self._asked.answer(ids, message["logp"], message["finish_reason"])
        event = self._line.next(self._config.turn_timeout_s)
        if not isinstance(event, Asked):
            return self._over(event)
        self._asked = event
        n = len(before)
        goes_on = event.ids[:n] == before and len(event.ids) > n
        new = event.ids[n:] if goes_on else event.ids
        said: Messages = [{"role": "tool" if goes_on else "user", "content": f"[{len(new)} tokens]"}]
        return Step(said, 0.0, info={"turns": self._turns}, ids=new, fresh=not goes_on)

    def close(self) -> None:
        """Refuse further requests, and stop the rollout."""
        self._line.close()
        if self._rollout is not None:
            self._rollout.cancel()

    async def _play(self, task: Any) -> None:
        try:
            async with _agent(self._config, self._line.url) as agent:
                self._line.end(await agent.run(task))
        except Exception as error:
            self._line.end(error)
            raise

    def _over(self, trace: Any) -> Step:
        if isinstance(trace, Exception) or not trace.ok:
            raise VerifiersError(_fault(trace))
        reward = float(trace.reward)
        parts = {f"reward/{name}": float(part.score) for name, part in trace.rewards.items() if part is not None}
        info = {"turns": self._turns, "success": reward >= self._config.success_at, **parts}
        cut = trace.stop_condition == "max_turns"
        return Step([], reward, terminated=not cut, truncated=cut, info=info)


def _fault(trace: Any) -> str:
    if isinstance(trace, Exception):
        return f"{type(trace).__name__}: {trace}"
    error = trace.errors[-1] if trace.errors else None
    return f"{trace.stop_condition}" if error is None else f"{error.type}: {error.message}"


def _task(path: str, numbers: Sequence[int], index: int) -> Task:
    return Task(f"{path}/{numbers[index]}", {"taskset": path, "number": numbers[index]})


@cache
def _tasks(path: str, most: int) -> Sequence[Any]:
    if ":" in path:
        make = load_function(path, "env.taskset")
    else:
        make = partial(_by_name, path)
    try:
        return list(islice(make(), most))
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"env.taskset={path}: gives no taskset ({type(error).__name__}: {said:.120})") from error


def _by_name(name: str) -> Any:
    _, loaders = _packages()
    return loaders.load_taskset(loaders.taskset_config_type(name)(id=name))


def _agent(config: Verifiers, url: str) -> Any:
    """Make the agent of one episode. Raises ConfigError."""
    v1, _ = _packages()
    renderer = None if config.renderer is None else {"name": config.renderer}
    try:
        client = v1.TrainClientConfig(
            base_url=f"{url}/v1", api_key_var=_NO_KEY, renderer=renderer, renderer_model_name=config.tokenizer
        )
        settings = v1.AgentConfig(
            harness={"id": config.harness},
            runtime={"type": config.runtime},
            model=MODEL,
            client=client,
            max_turns=config.max_turns,
        )
        return v1.Agent(settings)
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"env.harness={config.harness}: {type(error).__name__}: {said:.200}") from error


def _packages() -> tuple[Any, Any]:
    try:
        import verifiers.v1 as v1  # pyright: ignore[reportMissingImports]
        from verifiers.v1.utils import loaders  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"env.type=verifiers: the package verifiers cannot be imported ({error}): pip install 'ppojax[verifiers]'"
        ) from error
    return v1, loaders


_starting = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all rollouts of this process, in a thread of its own: verifiers keeps locks that need it."""
    with _starting:
        return _start_loop()


@cache
def _start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="verifiers").start()
    return loop
