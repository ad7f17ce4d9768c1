"""Questions from files: how they are read, split and refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ppojax.config import Config
from ppojax.envs import JsonLines
from ppojax.envs.rewards import Rewards
from ppojax.envs.rewards.rules import Exact, Numeric
from ppojax.errors import ConfigError, DataError

REWARD = Rewards(exact=Exact())


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def sums(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(start, start + n)]


def test_an_episode_is_one_answer(tmp_path: Path) -> None:
    config = JsonLines(path=written(tmp_path / "a.jsonl", *sums(40)), reward=REWARD, eval_share=0.3)
    task = config.tasks("train", 0)[0]
    env = config.make()
    reset = env.reset(task)
    assert reset.messages == [
        {"role": "system", "content": "Give the answer as <answer>...</answer>."},
        {"role": "user", "content": task.data["record"]["prompt"]},
    ]
    step = env.step({"role": "assistant", "content": f"It is <answer>{task.data['answer']}</answer>"})
    assert (step.reward, step.terminated, step.messages) == (1.0, True, [])
    assert step.info == {"reward/exact": 1.0, "success": True}
    assert env.step({"role": "assistant", "content": task.data["answer"]}).info["success"] is False
    assert (config.max_turns, config.stop, config.has_expert) == (1, (), False)


def test_no_prompt_is_in_both_splits(tmp_path: Path) -> None:
    """Held out by what is asked: the same prompt twice is on one side, whatever stands around it."""
    records = [r | {"n": n} for n in range(3) for r in sums(50)]
    config = JsonLines(path=written(tmp_path / "a.jsonl", *records), reward=REWARD, eval_share=0.3)
    train, held_out = ([t.data["record"]["prompt"] for t in config.tasks(s, 0)] for s in ("train", "eval"))
    assert len(train) + len(held_out) == 150 and not set(train) & set(held_out)
    assert 0.15 < len(held_out) / 150 < 0.45
    # Held-out tasks come in an order of their own, so that the first few are a fair sample.
    again, other = ([t.id for t in config.tasks("eval", seed)] for seed in (0, 1))
    assert again == [t.id for t in config.tasks("eval", 0)] != other
    assert sorted(again) == sorted(other)
    # A longer file leaves the prompts that it had where they were.
    longer = JsonLines(path=written(tmp_path / "b.jsonl", *records, *sums(9, 50)), reward=REWARD, eval_share=0.3)
    assert set(held_out) <= {t.data["record"]["prompt"] for t in longer.tasks("eval", 0)}


def test_lines_that_cannot_be_used_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counted and named in a warning; more than one in a hundred is a fault of the file."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([json.dumps(r).encode() for r in sums(198)] + [b"{", b"\xff"]))
    config = JsonLines(path=str(path), reward=REWARD, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert len(config.tasks("train", 0)) + len(config.tasks("eval", 0)) == 198
    (record,) = caplog.records  # the file is read once
    assert record.getMessage().startswith(
        f"{path}: 2 of 200 lines are left out; the first: {path}:199: not valid JSON ("
    )
    with pytest.raises(DataError, match=r"a\.jsonl:199: not valid JSON"):
        config.model_copy(update={"on_error": "error"}).tasks("train", 0)
    path.write_bytes(b"\n".join([json.dumps(r).encode() for r in sums(197)] + [b"{", b"[]", b"\xff"]))
    with pytest.raises(
        DataError, match=r"3 of 200 lines cannot be used, env.on_error=skip allows 1%; the first: .*:198:"
    ):
        config.tasks("train", 0)


def test_messages_other_keys_and_a_file_of_held_out_tasks(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2?"}]
    train = written(tmp_path / "a.jsonl", {"q": chat, "a": 2})
    held_out = written(tmp_path / "b.jsonl", {"q": "3?", "a": [3, "three"]})
    config = JsonLines(
        path=train, eval_path=held_out, prompt_field="q", answer_field="a", answer_format="whole", reward=REWARD
    )
    assert config.make().reset(config.tasks("train", 0)[0]).messages == chat
    env = config.make()
    assert len(env.reset(config.tasks("eval", 0)[0]).messages) == 2
    assert env.step({"role": "assistant", "content": "<think>hm</think>three"}).info["success"]
    silent = config.model_copy(update={"system": ""})
    assert len(silent.make().reset(config.tasks("eval", 0)[0]).messages) == 1
    written(tmp_path / "b.jsonl", {"q": "4?", "a": 4}, {"q": chat, "a": 2})
    with pytest.raises(DataError, match=r"b\.jsonl:2: this prompt is also at .*a\.jsonl:1; remove one of the two"):
        config.tasks("eval", 0)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"prompt": "x", "answer": }', r":2: not valid JSON \(Expecting value\), expected one JSON object"),
        (b'{"prompt": "x"', r":2: not valid JSON"),
        (b"[1]", r":2: a list, expected a JSON object; correct the line"),
        (b"[" * 100_000, r":2: not valid JSON \(RecursionError\)"),
        (b'{"prompt": "\\ud800", "answer": 1}', r":2: not valid JSON \(UnicodeEncodeError\)"),
        (b"\xff", r":2: not UTF-8 \(byte 0\), expected UTF-8; convert the file"),
        (
            b'{"question": "x", "answer": 1}',
            r":2: no key 'prompt', expected it beside question, answer; set env\.",
        ),
        (b'{"prompt": "x"}', r":2: no key 'answer', expected it beside prompt; set env\.answer_field to the right key"),
        (b'{"prompt": " ", "answer": 1}', r":2: a prompt that is no text, expected a text or a list of messages"),
        (b'{"prompt": [], "answer": 1}', r":2: a prompt that is no text"),
        (b'{"prompt": ["x"], "answer": 1}', r":2: message 1 of the prompt, expected role and content as texts"),
        (
            b'{"prompt": [{"role": "human", "content": "x"}], "answer": 1}',
            r":2: role 'human' in message 1, expected system \| user \| assistant \| tool; correct the line",
        ),
        (
            b'{"prompt": [{"role": "assistant", "content": "x"}], "answer": 1}',
            r":2: the prompt ends with an assistant message, expected a question",
        ),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, line: bytes, text: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"prompt": "ok", "answer": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"bad.jsonl{text}") as caught:
        JsonLines(path=str(file), reward=REWARD).tasks("train", 0)
    assert "\n" not in str(caught.value)


def test_files_without_tasks(tmp_path: Path) -> None:
    config = JsonLines(path=str(tmp_path / "no.jsonl"), reward=REWARD)
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read \(No such file or directory\), expected a file wi"):
        config.tasks("train", 0)
    (tmp_path / "no.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"no\.jsonl: is empty, expected one JSON object a line; fill it or choose"):
        config.tasks("train", 0)
    written(tmp_path / "no.jsonl", *sums(1))
    with pytest.raises(DataError, match=r"tasks to train on and \d held out, expected some of both; change env\.eval_"):
        config.tasks("train", 0)


def test_settings(tmp_path: Path) -> None:
    for reward in (REWARD, Rewards(numeric=Numeric())):
        with pytest.raises(ValidationError, match="reward compares with a reference, and answer_field is null"):
            JsonLines(path="x", answer_field=None, reward=reward)
    arguments = ("model.path=smollm2", "env.type=jsonl", "env.path=x.jsonl", "env.reward.exact.weight=2")
    config = Config.load(*arguments)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert Config.load(f"config={tmp_path}/c.yaml") == config and hash(config.env)
    with pytest.raises(ConfigError) as caught:
        Config.load("model.path=smollm2", "env.type=jsonl")
    assert str(caught.value).splitlines() == [
        "env.path is missing: expected str; file of tasks, one JSON object a line",
        "env.reward is missing: expected section; what is rewarded",
    ]
