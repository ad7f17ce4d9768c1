"""Environments beside the sampler: who waits for whom, and what becomes of those that hang or fail."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import pytest

from ppojax.envs import Reset, Step, Task
from ppojax.errors import DataError
from ppojax.models.forward import init
from ppojax.rollout import workers as working
from ppojax.rollout.collect import Collector
from ppojax.rollout.workers import AbandonedError, Workers
from ppojax.runtime.compiling import compile_metrics
from ppojax.types import Ending, Row
from tiny_model import (
    MODEL,
    TOKENIZER,
    Scripted,
    ScriptedEnv,
    collector_of,
    random_policy,
    sampler_of,
    scripted_task,
    stops,
)

KEY = jax.random.key(0)


def test_answers_come_in_the_order_of_questions_and_errors_are_kept() -> None:
    workers = Workers(2, 10.0)
    calls = [lambda: time.sleep(0.02) or 1, lambda: 2, lambda: sys.exit(3)]
    jobs = [workers.submit(call, None) for call in calls]
    assert workers.ended(idle=True) == jobs and [job.result for job in jobs] == [1, 2, None]
    assert isinstance(jobs[2].error, SystemExit) and workers.ended(idle=True) == []
    workers.close(wait=True)


def test_a_slow_answer_is_not_waited_for_unless_there_is_nothing_else_to_do() -> None:
    workers, gate = Workers(2, None), threading.Event()
    slow, quick = workers.submit(gate.wait, None), workers.submit(lambda: 7, None)
    start = time.monotonic()
    assert workers.ended(idle=False) == [quick] and workers.ended(idle=False) == []
    assert time.monotonic() - start < 0.5 and workers.waited_s == 0
    threading.Timer(0.05, gate.set).start()
    assert workers.ended(idle=True) == [slow] and 0.01 < workers.waited_s < 0.5
    workers.close(wait=True)


def test_a_call_that_hangs_is_left_behind_and_let_go_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, gate, closed = Workers(1, 0.05), threading.Event(), threading.Event()
    stuck, next_one = workers.submit(gate.wait, closed.set), workers.submit(lambda: 7, None)
    assert workers.ended(idle=True)[0] is stuck and isinstance(stuck.error, TimeoutError)
    assert next_one.result == 7 or workers.ended(idle=True) == [next_one]  # another thread took the place
    assert not closed.is_set()
    monkeypatch.setattr(working, "LEFT_BEHIND_MOST", 1)
    workers.submit(gate.wait, None)
    with pytest.raises(
        DataError, match=r"env: 2 calls of environments have hung for over rollout\.env_timeout_s=0\.05: "
    ):
        workers.ended(idle=True)
    gate.set()
    assert closed.wait(1)
    workers.close(wait=False)


def test_whose_episodes_are_abandoned_waits_no_longer() -> None:
    abandoned, gate = threading.Event(), threading.Event()
    workers = Workers(1, None, abandoned)
    workers.submit(gate.wait, None)
    start = time.monotonic()
    threading.Timer(0.1, abandoned.set).start()
    for _ in range(2):
        with pytest.raises(AbandonedError):
            workers.ended(idle=True)
    assert time.monotonic() - start < 2
    workers.close(wait=False)
    gate.set()


@dataclass
class SlowEnv(ScriptedEnv):
    """Sleeps where its task says so."""

    asleep: dict[str, float] = field(default_factory=dict)

    def reset(self, task: Task) -> Reset:
        time.sleep(task.data.get("reset_s", 0.0))
        return super().reset(task)

    def step(self, message: dict[str, Any]) -> Step:
        time.sleep(self.task.data.get("step_s", 0.0))
        return super().step(message)


class Slow(Scripted):
    def make(self) -> SlowEnv:
        """Make an environment for one episode."""
        return SlowEnv()


def collector(**changes: Any) -> Collector:
    settings = {"slots": 3, "workers": 2, "env_timeout_s": 30.0, "bucket": 8, "group_size": 1} | changes
    sampler = settings.pop("sampler", sampler_of(segment=4))
    return Collector(Slow(), TOKENIZER, sampler, stops(eos=range(1, 30, 5)), **settings)


def said(rows: tuple[Row, ...]) -> list[tuple[list[int], Ending, float]]:
    return [(row.token.tolist(), row.ending, float(row.reward.sum())) for row in rows]


TASKS = [scripted_task(f"{n}ab" * (n % 3 + 1), *[("c" * (n % 4), 0.5)] * (n % 3), ("done", 1.0)) for n in range(8)]


def test_who_waits_for_whom_changes_nothing() -> None:
    """Fewer slots than episodes, slow environments, other segments: the same episodes, in order."""
    plain = collector(slots=8, workers=0, sampler=sampler_of(segment=64))(random_policy(), TASKS, KEY)
    slow = [Task(t.id, t.data | {"step_s": 0.03 * (n % 2), "reset_s": 0.02 * (n % 3)}) for n, t in enumerate(TASKS)]
    few, unshared = collector(), collector(share_prompts=False)
    for other in (few(random_policy(), slow, KEY), unshared(random_policy(), TASKS, KEY)):
        assert said(other.rows) == said(plain.rows)
        for a, b in zip(other.rows, plain.rows, strict=True):
            np.testing.assert_allclose(a.logp_behavior, b.logp_behavior, rtol=1e-5, atol=1e-5)
    assert len({len(row.token) for row in plain.rows}) > 3
    grouped = collector(group_size=3)(random_policy(), TASKS[:3], KEY)
    alone = collector(group_size=3, share_prompts=False)(random_policy(), TASKS[:3], KEY)
    assert said(grouped.rows) == said(alone.rows)
    assert 0 < grouped.metrics["perf/slot_use"] <= 1


def test_an_environment_that_hangs_ends_its_own_episode_only() -> None:
    slow = [Task(t.id, t.data | {name: 1.0}) for t, name in zip(TASKS[:2], ("step_s", "reset_s"), strict=True)]
    start = time.monotonic()
    rollout = collector(env_timeout_s=0.1)(random_policy(), [*slow, *TASKS[2:]], KEY)
    assert time.monotonic() - start < 20
    assert [row.ending for row in rollout.rows[:2]] == [Ending.ERROR] * 2
    assert rollout.metrics["error/TimeoutError"] == 2
    plain = collector(slots=8, workers=0)(random_policy(), TASKS, KEY)
    assert said(rollout.rows[2:]) == said(plain.rows[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_run_closes_what_is_open(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ScriptedEnv] = []
    monkeypatch.setattr(Scripted, "make", lambda self: made.append(ScriptedEnv()) or made[-1])
    with pytest.raises(DataError, match="task 0123456789: its prompt has 13 tokens"):
        collector_of(positions=12, workers=workers)(random_policy(), [TASKS[0], scripted_task("0123456789")], KEY)
    end = time.monotonic() + 5
    while not all(env.closed for env in made) and time.monotonic() < end:
        time.sleep(0.01)
    assert len(made) == 4 and all(env.closed for env in made)


def test_nothing_compiles_after_the_first_steps() -> None:
    """Random lengths of prompts, turns and observations, and slots that are filled again at random times."""
    rng = np.random.default_rng(0)
    play = collector(slots=4, workers=0)

    def step(n: int) -> float:
        tasks = []
        for _ in range(12):
            turns = [("a" * int(rng.integers(0, 14)), 0.5) for _ in range(rng.integers(1, 4))]
            tasks.append(scripted_task("a" * int(rng.integers(1, 30)), *turns))
        play(random_policy(), tasks, jax.random.fold_in(KEY, n))
        return compile_metrics()["compile/count"]

    counts = [step(n) for n in range(10)]
    assert counts[4] == counts[9], counts


@pytest.mark.slow
def test_a_slow_tool_does_not_stall_the_batch() -> None:
    """One of 16 episodes waits 5 s for each of two answers, in a batch of over 20 s: it costs less than a tenth."""
    spec = MODEL.spec.model_copy(update={"layers": 6, "width": 512, "heads": 8, "head_width": 64, "ffn": 1536})
    model = replace(MODEL, spec=spec)
    sampler = replace(sampler_of(positions=512, turn_tokens=12, segment=8), model=model)
    tasks = [scripted_task(f"{n}", *[("c", 0.0)] * (3 + 4 * (n % 5)), ("done", 1.0)) for n in range(15)]
    play, policy = collector(slots=8, workers=4, sampler=sampler), init(model, KEY)

    def throughput(nap: float) -> float:
        sleepy = scripted_task("9", ("c", 0.0), ("done", 1.0))
        rollout = play(policy, [Task("sleepy", sleepy.data | {"step_s": nap}), *tasks], KEY)
        written = sum(int(row.action.sum()) for row in rollout.rows)
        print(f"nap {nap} s: {written} tokens in {rollout.metrics['timing_s/gen']:.1f} s")
        return written / rollout.metrics["timing_s/gen"]

    throughput(0.0)
    plain, slow = throughput(0.0), throughput(5.0)
    assert slow > 0.9 * plain, (plain, slow)
