"""Prompts and answers from files with one JSON object a line, split into training and held-out tasks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ppojax.envs.answers import INSTRUCTIONS, AnswerFormat, extract
from ppojax.envs.base import EnvSettings, Split, Task
from ppojax.envs.rewards import Answered, Rewards
from ppojax.errors import DataError
from ppojax.types import Messages

log = logging.getLogger(__name__)

SKIPPED_MOST = 0.01  # of a file's lines
ROLES = ("system", "user", "assistant", "tool")


class RecordSettings(EnvSettings):
    """What environments share whose tasks are lines of a file, each a JSON object with a prompt and an answer.

    A prompt is a text, or a list of messages in the shape of the OpenAI chat API. Held out are the lines of
    `eval_path`, or a share of `path`, chosen by the prompt: a prompt that stands there twice is on one side only.
    """

    path: str = Field(description="file of tasks, one JSON object a line")
    eval_path: str | None = Field(default=None, description="file of held-out tasks; null takes a share of path")
    eval_share: float = Field(default=0.1, gt=0, lt=1, description="share of path that is held out, without eval_path")
    on_error: Literal["error", "skip"] = Field(
        default="error",
        description="what is done with a line that cannot be used; skip: it is left out, with a warning, and over 1% "
        "of such lines are an error",
    )
    prompt_field: str = Field(default="prompt", description="key of the prompt: a text, or a list of messages")
    answer_field: str | None = Field(default="answer", description="key of the reference answer; null for none")
    system: str | None = Field(
        default=None, description="system message of prompts without one; empty for none, null says how to answer"
    )
    answer_format: AnswerFormat = Field(default="tags", description="where the answer is looked for in the last turn")
    reward: Rewards = Field(description="what is rewarded")

    @model_validator(mode="after")
    def _answerable(self) -> RecordSettings:
        if self.answer_field is None and (self.reward.exact or self.reward.numeric):
            raise ValueError("reward compares with a reference, and answer_field is null: give answer_field")
        return self

    def tasks(self, split: Split, seed: int) -> Sequence[Task]:
        """List the tasks of a split; held-out tasks are in an order of their own, shuffled by the seed.

        Raises:
            ConfigError: a reward function cannot be loaded.
            DataError: a file cannot be used; it names file and line.
        """
        self.reward.load()
        train, held_out = self._splits()
        if split == "train":
            return train
        return sorted(held_out, key=lambda task: _digest(f"{seed} {task.id}"))

    def grade(self, task: Task, messages: Messages, words: str) -> tuple[float, dict[str, Any]]:
        """Grade an episode by its last message; the answer is looked for in `words`, what it says to the user."""
        extracted, said = extract(words, self.answer_format), messages[-1].get("content") or ""
        return self.reward.grade(Answered(said, extracted, task.data["answer"], messages, task.data["record"]))

    def prompt(self, task: Task) -> Messages:
        """Write the prompt of a task."""
        messages: Messages = task.data["messages"]
        system = INSTRUCTIONS[self.answer_format] if self.system is None else self.system
        if not system or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": system}, *messages]

    def _splits(self) -> tuple[list[Task], list[Task]]:
        tasks = self._read(self.path)
        if self.eval_path is not None:
            held_out = self._read(self.eval_path)
            known = {_key(task): task.id for task in tasks}
            for task in held_out:
                if _key(task) in known:
                    raise DataError(f"{task.id}: this prompt is also at {known[_key(task)]}; remove one of the two")
            return tasks, held_out
        train, held_out = [], []
        for task in tasks:
            (held_out if int(_digest(_key(task)), 16) < self.eval_share * 2**64 else train).append(task)
        if not train or not held_out:
            raise DataError(
                f"{self.path}: {len(train)} tasks to train on and {len(held_out)} held out, expected some of both; "
                "change env.eval_share, or give env.eval_path"
            )
        return train, held_out

    def _read(self, path: str) -> list[Task]:
        try:
            stat = Path(path).stat()
            version = (stat.st_mtime_ns, stat.st_size)
            return _read(path, self.prompt_field, self.answer_field, self.on_error == "skip", version)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}), expected a file with one JSON object a line; "
                f"the path is taken from {Path.cwd()}"
            ) from error


@lru_cache(maxsize=8)
def _read(path: str, prompt_field: str, answer_field: str | None, skip: bool, _version: tuple[int, int]) -> list[Task]:
    tasks: list[Task] = []
    faults: list[DataError] = []
    with Path(path).open("rb") as file:
        for n, line in enumerate(file, 1):
            try:
                if text := _text(f"{path}:{n}", line):
                    tasks.append(_task(f"{path}:{n}", text, prompt_field, answer_field))
            except DataError as fault:
                if not skip:
                    raise
                faults.append(fault)
    lines = len(tasks) + len(faults)
    if len(faults) > SKIPPED_MOST * lines:
        raise DataError(
            f"{path}: {len(faults)} of {lines} lines cannot be used, env.on_error=skip allows {SKIPPED_MOST:.0%}; the "
            f"first: {faults[0]}"
        )
    if faults:
        log.warning("%s: %d of %d lines are left out; the first: %s", path, len(faults), lines, faults[0])
    if not tasks:
        raise DataError(f"{path}: is empty, expected one JSON object a line; fill it or choose another file")
    return tasks


def _text(where: str, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if where.endswith(":1") else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}), expected UTF-8; convert the file") from error


def _task(where: str, line: str, prompt_field: str, answer_field: str | None) -> Task:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # lone surrogates could never be written
    except (ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise DataError(f"{where}: not valid JSON ({said}), expected one JSON object; correct the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, expected a JSON object; correct the line")
    for key, setting in ((prompt_field, "prompt_field"), (answer_field, "answer_field")):
        if key is not None and key not in record:
            there = ", ".join(record) or "none"
            raise DataError(f"{where}: no key {key!r}, expected it beside {there}; set env.{setting} to the right key")
    answer = None if answer_field is None else record[answer_field]
    return Task(where, {"messages": _messages(where, record[prompt_field]), "answer": answer, "record": record})


def _messages(where: str, prompt: Any) -> Messages:
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: a prompt that is no text, expected a text or a list of messages; correct the line")
    for n, message in enumerate(prompt, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {n} of the prompt, expected role and content as texts; correct the line")
        if message.get("role") not in ROLES:
            role = f"{message.get('role')!r:.40}"
            raise DataError(f"{where}: role {role} in message {n}, expected {' | '.join(ROLES)}; correct the line")
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with an assistant message, expected a question; correct the line")
    return prompt


def _key(task: Task) -> str:
    return json.dumps(task.data["messages"], sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
