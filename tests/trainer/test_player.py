"""Episodes that are played while earlier steps are trained: the same ones, faults that surface, and no thread left."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ppojax.cli import run_command
from ppojax.envs import Calculator, Env, Step, Task
from ppojax.errors import DataError, DivergedError
from ppojax.experience.summary import staleness_metrics
from ppojax.models.forward import Params
from ppojax.rollout.collect import Collector
from ppojax.rollout.tasks import task_stream
from ppojax.rollout.workers import AbandonedError
from ppojax.train import main
from ppojax.trainer import Trainer, build, trainer
from ppojax.trainer.meter import Meter
from ppojax.trainer.player import Player
from ppojax.trainer.trainer import StepOut
from ppojax.types import Ending, Rollout, Row
from tiny_config import tiny, tiny_run

AHEAD = "rollout.mode=one_step_off"
# No reward is earned by a fresh model: the entropy bonus is what moves it.
PLAIN = ("warm_start=null", "advantage.type=group", "loss.entropy_coefficient=0.3")
CLOCKS = ("timing_s/", "perf/", "compile/")
Built = tuple[build.Parts, build.States]
Script = Callable[[Sequence[Task], threading.Event], None]


@dataclass(frozen=True)
class Played(Collector):
    """Plays nothing: one row a task, after what a script does."""

    script: Script = lambda tasks, abandoned: None

    def __call__(
        self, params: Params, tasks: Sequence[Task], key: jax.Array, abandoned: threading.Event | None = None
    ) -> Rollout:
        """See the class."""
        assert abandoned is not None
        self.script(tasks, abandoned)
        nothing = np.ones(1)
        return Rollout(tuple(Row(nothing, nothing, nothing, nothing, n, n, 0, Ending(0)) for n, _ in enumerate(tasks)))


@pytest.fixture(scope="module")
def parts() -> Built:
    return build.build(tiny(*PLAIN))


@pytest.fixture(autouse=True)
def promotion_in_threads_too() -> Iterator[None]:
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("player")] == []


def player_of(parts: Built, script: Script, *arguments: str) -> tuple[Player, Callable[[int], Rollout]]:
    """A player whose episodes are a script, and what asks it for those of a step."""
    config = tiny(*PLAIN, *arguments)
    collector = Played(**{**vars(parts[0].collector), "script": script})
    stream = task_stream(parts[0].train_tasks, config.rollout.prompts, config.seed)
    player = Player(config, replace(parts[0], collector=collector), stream)
    weights = parts[1].actor.params

    def step(number: int) -> Rollout:
        return player(number, [weights] * (config.rollout.staleness + 1), Meter())

    return player, step


def test_tasks_and_versions_are_those_of_stale_weights(parts: Built) -> None:
    """Of three steps, with weights of two steps before; nothing is played for a fourth."""
    said: dict[str, list[Any]] = {}
    for name in ("rollout.mismatch.stale_steps=2", AHEAD):
        calls: list[tuple[str, list[str]]] = []

        def script(tasks: Sequence[Task], abandoned: threading.Event, calls: list[Any] = calls) -> None:
            calls.append((threading.current_thread().name, [task.id for task in tasks]))

        more = ("rollout.max_staleness=2",) if name == AHEAD else ()
        player, step = player_of(parts, script, name, *more, "steps=3")
        for number in range(3):
            rollout = step(number)
            said.setdefault(name, []).append((player.tasks, [row.version for row in rollout.rows]))
            player.settle()
            assert len(calls) == (3 if name == AHEAD else number + 1)
        said[name].append([tasks for _, tasks in calls])
        assert all(thread.startswith("player" if name == AHEAD else "MainThread") for thread, _ in calls)
        player.stop()
    one, other = said.values()
    assert one == other
    assert [versions for _, versions in one[:3]] == [[0] * 4] * 3 and one[0][0] != one[1][0]


def test_a_fault_is_raised_by_the_step_whose_episodes_failed(parts: Built) -> None:
    calls: list[int] = []

    def script(tasks: Sequence[Task], abandoned: threading.Event) -> None:
        calls.append(len(calls))
        if calls[-1] == 1:
            raise DataError("env: it broke")

    player, step = player_of(parts, script, AHEAD)
    assert len(step(0).rows) == 4
    for _ in range(2):
        with pytest.raises(DataError, match="env: it broke"):
            step(1)
    player.stop()
    assert len(step(1).rows) == 4  # it is played again
    player.stop()


def test_who_stops_or_is_interrupted_waits_for_nobody(parts: Built) -> None:
    """Step 1 never ends; a Ctrl-C gets through to who waits for it, and `stop` ends it and takes its tasks back."""
    calls: list[list[str]] = []

    def script(tasks: Sequence[Task], abandoned: threading.Event) -> None:
        calls.append([task.id for task in tasks])
        if len(calls) == 2:
            assert abandoned.wait(60)
            raise AbandonedError

    player, step = player_of(parts, script, AHEAD)
    step(0)
    start, main_thread = time.monotonic(), threading.main_thread().ident
    assert main_thread is not None
    threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        step(1)
    player.stop()
    assert time.monotonic() - start < 10
    step(1)
    assert calls[2] == calls[1] != calls[0]
    player.stop()


def test_staleness_is_of_tokens() -> None:
    def row(version: int, actions: int) -> Row:
        nothing = np.zeros(4)
        return Row(nothing, np.arange(4) < actions, nothing, nothing, 0, 0, 0, Ending(0), version=version)

    got = staleness_metrics([row(3, 3), row(5, 1)], 5)
    assert got == {"staleness/mean": 1.5, "staleness/max": 2.0}
    assert staleness_metrics([row(5, 0)], 5) == {"staleness/mean": 0.0, "staleness/max": 0.0}


def timeless(out: StepOut) -> tuple[dict[str, float], list[Any]]:
    """What of a step does not depend on the clock, to the bit."""
    rows = [(row.token.tolist(), row.logp_behavior.tobytes(), row.version) for row in out.rollout.rows]
    return {name: value for name, value in out.metrics.items() if not name.startswith(CLOCKS)}, rows


def states(trainer: Trainer) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(trainer.state())]


def follow(ahead: Trainer, steps: Sequence[Any]) -> None:
    """Check that the next steps are these, which a trainer in sync mode did, with the states after them."""
    for want, after in steps:
        assert timeless(ahead.step()) == want
        assert all(np.array_equal(a, b) for a, b in zip(states(ahead), after, strict=True))


def test_it_is_training_with_stale_weights_to_the_bit() -> None:
    """Rows, metrics and states of four steps; from a checkpoint in the middle too, whatever was being played."""
    sync, ahead = Trainer(tiny(*PLAIN, "rollout.mismatch.stale_steps=1")), Trainer(tiny(*PLAIN, AHEAD))
    steps = [(timeless(sync.step()), states(sync)) for _ in range(4)]
    assert [metrics["staleness/mean"] for (metrics, _), _ in steps] == [0, 1, 1, 1]
    assert [{row[2] for row in rows} for (_, rows), _ in steps] == [{0}, {0}, {1}, {2}]
    assert steps[2][0][0]["staleness/max"] == 1 and steps[2][0][0]["sampling/logp_diff_mean"] > 1e-4
    follow(ahead, steps[:2])
    state, position = jax.device_get(ahead.state()), json.loads(json.dumps(ahead.position()))
    follow(ahead, steps[2:])
    ahead.restore(jax.device_put(state), position)
    follow(ahead, steps[2:])
    ahead.close()


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["shared", "own"])
def test_on_several_devices_with_dynamic_sampling_and_adapters(devices: str) -> None:
    """Two devices train in one layout, as many sample in another one; two steps are played ahead."""
    same = (*PLAIN, "mesh.fsdp=2", "rollout.mesh.data=2", "rollout.dynamic_rounds=2", "model.lora.rank=4")
    sync = Trainer(tiny(*same, "rollout.mismatch.stale_steps=2"))
    ahead = Trainer(tiny(*same, AHEAD, "rollout.max_staleness=2", f"rollout.devices={devices}"))
    assert ahead.parts.devices == (2 if devices == "shared" else 4)
    follow(ahead, [(timeless(sync.step()), states(sync)) for _ in range(4)])
    ahead.close()


class SlowEnv:
    """An environment whose steps are preceded by something."""

    def __init__(self, env: Env, before: Callable[[], object]) -> None:
        self.reset, self._step, self.close, self._before = env.reset, env.step, env.close, before

    def step(self, message: dict[str, Any]) -> Step:
        self._before()
        return self._step(message)


def test_a_run_that_ends_while_episodes_hang_ends_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update diverges in step 1, while the episodes of step 2 wait for their environments."""
    second, hanging, gate, diverged = threading.Event(), threading.Event(), threading.Event(), [0.0]

    def play(self: Player, number: int, params: Params, plain: Any = Player._play) -> Any:
        if number == 1:
            second.set()
        return plain(self, number, params)

    def hang() -> None:
        if second.is_set():
            hanging.set()
            gate.wait(60)

    def diverge(*_: object) -> None:
        assert hanging.wait(60)
        diverged[0] = time.monotonic()
        raise DivergedError("actor: it diverged")

    monkeypatch.setattr(trainer, "update_actor", diverge)
    monkeypatch.setattr(Player, "_play", play)
    monkeypatch.setattr(Calculator, "make", lambda self, plain=Calculator.make: SlowEnv(plain(self), hang))
    code = run_command(main, tiny_run(tmp_path, *PLAIN, AHEAD, "rollout.workers=8", "steps=3"))
    assert time.monotonic() - diverged[0] < 5
    gate.set()
    assert code == 4 and capsys.readouterr().err == "ppojax: error: actor: it diverged\n"
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 4


class Sleepy(Calculator):
    """A calculator that takes its time."""

    nap_s: float = 1.0

    def make(self) -> Env:
        """Make an environment for one episode."""
        return SlowEnv(super().make(), partial(time.sleep, self.nap_s))


@pytest.mark.slow
def test_the_wait_for_environments_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers take a second, and so does an update that leaves the core alone, as one on an accelerator does.

    A step takes G for writing, W for waiting and U for the update: G + W + U in sync mode, max(G + W, U) if both go on
    at a time.
    """

    def update(*arguments: Any, plain: Any = trainer.update_actor) -> Any:
        time.sleep(1.0)
        return plain(*arguments)

    monkeypatch.setattr(trainer, "update_actor", update)
    config = tiny(*PLAIN, "rollout.workers=8")
    config = config.model_copy(update={"env": Sleepy(**config.env.model_dump())})
    seconds = {}
    for mode in ("sync", "one_step_off"):
        run = Trainer(config.model_copy(update={"rollout": config.rollout.model_copy(update={"mode": mode})}))
        steps = [run.step().metrics for _ in range(6)][2:]
        names = ("step", "gen", "env_wait", "update_actor")
        seconds[mode] = {name: float(np.median([step[f"timing_s/{name}"] for step in steps])) for name in names}
        run.close()
    sync, ahead = seconds["sync"], seconds["one_step_off"]
    ratio, predicted = ahead["step"] / sync["step"], max(sync["gen"], sync["step"] - sync["gen"]) / sync["step"]
    print(f"{seconds}: ratio {ratio:.2f}, predicted {predicted:.2f}")
    assert sync["env_wait"] > 0.9 and ratio < predicted + 0.15 < 0.85
