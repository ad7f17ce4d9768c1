"""Episodes: the sampler writes in its slots while environments answer, until every episode has ended.

Episodes wait for a slot, and keep it to their end. All that touches a device happens in the caller's thread;
workers run environments only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import jax
import numpy as np

from ppojax.envs import EnvConfig, Reset, Task
from ppojax.errors import DataError
from ppojax.models.forward import Params
from ppojax.models.tokenizer import Tokenizer
from ppojax.rollout.board import Board
from ppojax.rollout.compaction import Compactor
from ppojax.rollout.decode import Turns, begin_turn, decode, no_turns
from ppojax.rollout.episode import Episode, LateEnv, Tail
from ppojax.rollout.exact import Judge, resume, rewind
from ppojax.rollout.prompts import ANY_THAT_FITS, LongPromptError, Prompt, PromptLimit, answer_ids
from ppojax.rollout.sampler import SamplerDef, record_shapes
from ppojax.rollout.together import together
from ppojax.rollout.workers import PROMPT_S, Job, Workers
from ppojax.types import Ending, Messages, Rollout


@dataclass(frozen=True)
class Collector:
    """Plays episodes of one environment with one sampler."""

    env: EnvConfig
    tokenizer: Tokenizer
    sampler: SamplerDef
    stop_SV: jax.Array
    group_size: int
    bucket: int  # lengths of prompts and observations are padded to this times a power of two
    slots: int  # rows that are written at a time; other episodes wait
    workers: int = 0  # threads that run environments; with 0 they run in order, in the caller's thread
    env_timeout_s: float | None = None  # of a reset or a step, in a thread
    judge: Judge | None = None  # what decides on draws instead of decoding
    share_prompts: bool = True  # episodes that begin alike have their prompt read once
    episode_tokens: int | None = None  # that the policy writes in an episode, at most
    hint_tokens: int = 0  # of what only the critics are shown of a task, at most
    compactor: Compactor | None = None  # what replaces the history of a full context
    prompt_limit: PromptLimit = ANY_THAT_FITS

    def __call__(
        self, params: Params, tasks: Sequence[Task], key: jax.Array, abandoned: Event | None = None
    ) -> Rollout:
        """Play `group_size` episodes of each task to their end.

        Rows are in the order of the tasks, those of an episode one after another.

        Raises:
            DataError: a prompt is too long (see `PromptLimit`), the episodes of a task begin differently, or too many
                environments hang.
            AbandonedError: `abandoned` was set before the end.
        """
        if jax.process_count() > 1:
            return together(partial(self._play, params, key, abandoned), tasks)
        return self._play(params, key, abandoned, tasks, 0)

    def _play(
        self, params: Params, key: jax.Array, abandoned: Event | None, tasks: Sequence[Task], first: int
    ) -> Rollout:
        """Play tasks of which the first has this number."""
        start = time.perf_counter()
        play, whole = _Play(self, params, key, first, abandoned), False
        try:
            play.run(tasks)
            whole = True
        finally:
            play.close(wait=whole)
        return play.rollout(time.perf_counter() - start)

    def render(self, task: Task, reset: Reset) -> Prompt:
        """Write how an episode starts as tokens, with room for a turn behind them (see `PromptLimit.render`)."""
        return self.prompt_limit.render(self.tokenizer, task, reset, self.sampler.positions - 1)


class _Play:
    """The episodes of one call, and where they are."""

    def __init__(
        self, collector: Collector, params: Params, key: jax.Array, first: int, abandoned: Event | None
    ) -> None:
        self.first = first  # number of the first group
        self.collector, self.sampler, self.params, self.key = collector, collector.sampler, params, key
        self.workers = Workers(collector.workers, collector.env_timeout_s, abandoned)
        self.asked: dict[Job, Episode] = {}  # episodes whose environment is at work
        self.slow: set[Episode] = set()  # and those that have been waited for in vain
        self.episodes: list[Episode] = []
        self.tasks: Sequence[Task] = ()
        self.prompts: dict[int, list[int]] = {}  # of each group
        self.hints: dict[int, list[int] | None] = {}  # what only critics are shown of each
        self.ready: list[Episode] = []  # waiting for a slot
        how = {"smallest": collector.bucket, "share": collector.share_prompts}
        self.board = Board(params, self.sampler, collector.slots, **how)
        self.turns = no_turns(collector.slots)
        self.over: list[int] = []  # slots whose turns are over
        self.written = self.passes = self.judged = self.redrawn = 0

    def run(self, tasks: Sequence[Task]) -> None:
        """Play to the end of every episode."""
        self._begin(tasks)
        while any(e.ending is None for e in self.episodes):
            for job in self.workers.ended(idle=not self.turns.live_B.any()):
                self._answered(job)
            for episode in self.board.admit(self.ready):
                self._begin_turn(episode)
            self.board.read()
            if self.turns.live_B.any():
                self._decode()
        self.board.keep_experts()

    def close(self, wait: bool) -> None:
        """Let environments go that are still there."""
        busy = {episode for job, episode in self.asked.items() if job.leave()}
        for episode in self.episodes:
            if episode.ending is None and episode not in busy:
                self.workers.submit(episode.close, None)
        self.workers.close(wait)

    def rollout(self, seconds: float) -> Rollout:
        """The finished rows. A failed episode without a prompt has its group's, so that rows stay aligned."""
        for episode in self.episodes:
            if not episode.token:
                ids = self.prompts.get(episode.group, [self.collector.tokenizer.eos_ids[0]])
                episode.write(ids, action=False)
                hint = self.hints.get(episode.group)  # that rows of a group share
                episode.hint = None if hint is None else np.array(hint, np.int32)
        errors = Counter(e.info["error"] for e in self.episodes if e.ending == Ending.ERROR)
        metrics = {f"error/{name}": float(count) for name, count in errors.items()}
        metrics["timing_s/gen"], metrics["timing_s/env_wait"] = seconds, self.workers.waited_s
        if self.collector.prompt_limit.policy == "truncate":
            metrics["data/prompts_cut"] = float(len({e.group for e in self.episodes if e.info.get("prompt_cut")}))
        metrics["perf/slot_use"] = self.written / max(self.passes * self.collector.slots, 1)
        if self.judged:
            metrics["sampling/redrawn_frac"] = self.redrawn / self.judged
        return Rollout(tuple(row for e in self.episodes for row in e.rows()), metrics)

    def _begin(self, tasks: Sequence[Task]) -> None:
        """Start every episode; those of a group have to begin alike."""
        self.tasks, size = tasks, self.collector.group_size
        nothing = jax.tree.map(lambda kept: np.zeros(kept.shape, kept.dtype), record_shapes(self.sampler, 0))
        for number in range(self.first * size, (self.first + len(tasks)) * size):
            env = LateEnv(self.collector.env.make)
            episode = Episode(env, number // size, number, [], [], recorded=[nothing])
            self.episodes.append(episode)
            self._ask(episode, partial(episode.env.reset, tasks[episode.group - self.first]))

    def _ask(self, episode: Episode, call: Callable[[], Any]) -> None:
        self.asked[self.workers.submit(call, episode.close, episode not in self.slow)] = episode

    def _answered(self, job: Job) -> None:
        """Take what an environment says, and go on, or end the episode."""
        episode = self.asked.pop(job, None)
        if episode is None:  # it has been closed
            return
        if job.took_s > PROMPT_S:
            self.slow.add(episode)
        if job.error is not None:
            episode.fail(job.error)
        elif not episode.token:
            self._started(episode, job.result)
        else:
            self._observe(episode, job.result)
        if episode.ending is not None:
            self._leave(episode, close=not job.left)

    def _leave(self, episode: Episode, close: bool = True) -> None:
        """Let the slot and the environment of an episode go that is over."""
        self.board.leave(episode)
        if close:
            self.workers.submit(episode.close, None)

    def _started(self, episode: Episode, reset: Any) -> None:
        task = self.tasks[episode.group - self.first]
        try:
            ids, episode.messages, cut = self.collector.render(task, reset)
            episode.reset = Reset(list(episode.messages), reset.tools)
            episode.hint = self._hint(reset.privileged)
        except LongPromptError:
            raise
        except Exception as error:  # an environment is user code: its failure ends its own episode only
            episode.fail(error)
            return
        hint = None if episode.hint is None else episode.hint.tolist()
        if self.prompts.setdefault(episode.group, ids) != ids or self.hints.setdefault(episode.group, hint) != hint:
            raise DataError(
                f"task {task.id}: its environment starts the episodes of a group differently: "
                f"make reset depend on the task alone, or set rollout.group_size=1"
            )
        episode.write(ids, action=False)
        episode.info |= {"prompt_cut": True} if cut else {}
        self.ready.append(episode)

    def _hint(self, privileged: str) -> np.ndarray | None:
        """What the critics are shown before the row."""
        most = self.collector.hint_tokens
        return np.array(self.collector.tokenizer.encode(privileged)[:most], np.int32) if most and privileged else None

    def _observe(self, episode: Episode, step: Any) -> None:
        """Write an answer behind the turn, if the next turn has room behind it."""
        new, tokenizer = episode.hear(step), self.collector.tokenizer
        if episode.ending is not None:
            return
        ended, most = episode.token[-1] in tokenizer.eos_ids, self.sampler.positions
        try:
            suffix = answer_ids(tokenizer, step, ended=ended, room=most)
        except Exception as error:  # an environment may say anything, such as what this vocabulary cannot write
            episode.fail(error)
            return
        compactor, tokens = self.collector.compactor, len(episode.token) + len(suffix or ())
        if suffix is None or self._left(episode) <= 0:
            episode.drop(new)
        elif step.fresh:
            del episode.messages[len(episode.messages) - len(new) :]
            self._restart(episode, suffix, new, Tail([], [], []))
        elif compactor is None or not (
            compactor.due(episode, tokens) and self._compact(compactor, episode, new, suffix)
        ):
            self._answer(episode, new, suffix)

    def _answer(self, episode: Episode, new: Messages, suffix: list[int]) -> None:
        """Write an answer and begin the next turn, if there is room for both."""
        if len(episode.token) + len(suffix) >= self.sampler.positions:
            episode.drop(new)
            return
        self._write(episode, suffix)
        self._begin_turn(episode)

    def _compact(self, compactor: Compactor, episode: Episode, new: Messages, suffix: list[int]) -> bool:
        """Ask for a summary of the history, or replace it at once; say whether either could be.

        Where not, the row is the episode's last one.
        """
        tail = compactor.tail(episode, suffix)
        asked = None if tail is None else compactor.ask(episode, new, tail)
        if tail is None or asked is None:
            episode.last = True
            return False
        # What the environment answered is said again with what is asked, or read in the next row.
        episode.messages = [*episode.messages[: len(episode.messages) - len(new)], *asked.messages]
        if not compactor.request:
            self._go_on(compactor, episode, tail, "")
            return True
        self._write(episode, asked.token)
        episode.tail = tail
        self._begin_turn(episode, tokens=compactor.settings.written)
        return True

    def _go_on(self, compactor: Compactor, episode: Episode, tail: Tail, summary: str) -> None:
        """Go on in a new row."""
        assert episode.reset is not None
        messages = compactor.prompt(episode.reset, summary)
        try:
            prompt = self.collector.tokenizer.render(messages, episode.reset.tools)
        except DataError as error:  # what the policy wrote cannot be written by the template
            episode.fail(error)
            return
        self._restart(episode, prompt, messages, tail)

    def _restart(self, episode: Episode, prompt: list[int], messages: Messages, tail: Tail) -> None:
        """Cut the row and begin another one, if it has room for a turn."""
        if self._left(episode) <= 0 or len(prompt) + len(tail.token) >= self.sampler.positions:
            episode.ending = Ending.TRUNCATED
            return
        self.board.keep_experts_of(episode)
        episode.cut(prompt, messages, tail)
        self.board.restart(episode)
        self._begin_turn(episode)

    def _write(self, episode: Episode, ids: list[int]) -> None:
        episode.write(ids, action=False)
        self.board.append(episode, ids)

    def _begin_turn(self, episode: Episode, tokens: int | None = None) -> None:
        """Let the policy write a turn of at most so many tokens."""
        if tokens is None:
            compactor = self.collector.compactor
            tokens = self.sampler.turn_tokens if compactor is None else compactor.turn_limit(episode)
        episode.begin_turn()
        begin_turn(self.turns, self.board.slot_of(episode), episode.seed, min(tokens, self._left(episode)))

    def _left(self, episode: Episode) -> int:
        """Tokens that the policy may still write in the episode."""
        most = self.collector.episode_tokens
        return self.sampler.positions if most is None else most - episode.written

    def _decode(self) -> None:
        """Let every live slot write a segment; turns that are over go to their environments."""
        stop_SV, turns, board = self.collector.stop_SV, self.turns, self.board
        board.slots, segment = decode(self.params, board.slots, turns, self.key, stop_SV, sampler=self.sampler)
        segment = jax.device_get(segment)
        left_B = turns.left_B - segment.count_B
        self.turns = Turns(np.array(segment.live_B), turns.episode_B, np.array(segment.state_B), left_B)
        self.written += int(segment.count_B.sum())
        self.passes += int(segment.count_B.max())
        for b in np.flatnonzero(turns.live_B).tolist():
            episode, n = self.board.held[b], int(segment.count_B[b])
            assert episode is not None
            episode.write(segment.token_BN[b, :n].tolist(), action=True, logp=segment.logp_BN[b, :n].tolist())
            episode.recorded.append(jax.tree.map(lambda kept, b=b, n=n: kept[b, :n].copy(), segment.recorded))
            if not segment.live_B[b]:
                self.over.append(b)
        judge = self.collector.judge
        over, self.over = (self.over, []) if judge is None else (self._judged(judge), self.over)
        for b in over:
            episode = self.board.held[b]
            assert episode is not None
            self._say(episode, stopped=int(self.turns.state_B[b]) == stop_SV.shape[0] - 1)

    def _judged(self, judge: Judge) -> list[int]:
        """Slots whose turns are over and were drawn by the trainer's pass too, a batch at a time while others write.

        A turn of which it draws another token goes on from there.
        """
        agreed: list[int] = []
        board = self.board
        while self.over and (len(self.over) >= judge.rows or not self.turns.live_B.any()):
            slots, self.over = self.over[: judge.rows], self.over[judge.rows :]
            episodes = [episode for b in slots if (episode := self.board.held[b]) is not None]
            verdicts = judge(self.params, self.key, self.sampler, episodes)
            for b, episode, (token, logp, recorded, whole) in zip(slots, episodes, verdicts, strict=True):
                length = len(episode.token)
                episode.rewrite_turn(token, logp, recorded)
                self.judged += len(token)
                if whole:
                    agreed.append(b)
                    continue
                self.redrawn += 1
                new = len(episode.token)
                board.slots = rewind(board.slots, np.int32(b), np.int32(new - 1), sampler=self.sampler)
                board.read_now(b, episode.token[-1:])
                room, table = self.sampler.positions - new, np.asarray(self.collector.stop_SV)
                resume(self.turns, b, token, length - new, room, table)
                if not self.turns.live_B[b]:
                    self.over.append(b)
        return agreed

    def _say(self, episode: Episode, *, stopped: bool) -> None:
        tokenizer, ids = self.collector.tokenizer, episode.token[episode.turns[-1].token :]
        episode.clipped |= not stopped
        message = episode.say(tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.eos_ids else ids))
        if self.collector.env.writes_tokens:
            reason = "stop" if stopped else "length"
            message = message | {"token_ids": ids, "logp": episode.logp[-len(ids) :], "finish_reason": reason}
        compactor, tail = self.collector.compactor, episode.tail
        if compactor is None or tail is None:
            self._ask(episode, partial(episode.env.step, message))
            return
        self._go_on(compactor, episode, tail, message["content"])
        if episode.ending is not None:
            self._leave(episode)
