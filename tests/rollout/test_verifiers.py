"""Episodes of verifiers through the collector: with a stand-in for its agent, and with the package where it is."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ppojax.config import Config
from ppojax.envs import Verifiers
from ppojax.envs import verifiers as adapter
from ppojax.errors import ConfigError
from ppojax.models.forward import ModelDef, init
from ppojax.models.spec import DecoderSpec
from ppojax.models.tokenizer_files import tokenizer_from_hf
from ppojax.rollout.collect import Collector
from ppojax.rollout.sampler import SamplerDef
from ppojax.rollout.stop import stop_table
from ppojax.types import Ending, Row
from real_tokenizers import write_qwen3
from tiny_model import TOKENIZER, collector_of, random_policy, sampler_of

KEY = jax.random.key(0)
EOS = TOKENIZER.eos_ids[0]
PROMPT, MORE, OTHER = (TOKENIZER.encode(text) for text in ("12?", "345 ", "67?"))


def post(url: str, ids: Sequence[int]) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/inference/v1/generate", json.dumps({"token_ids": list(ids)}).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["choices"][0]


def trace(**changes: Any) -> SimpleNamespace:
    fields = {"ok": True, "reward": 0.75, "errors": [], "stop_condition": "agent_completed"}
    return SimpleNamespace(**fields | {"rewards": {"right": SimpleNamespace(score=0.75)}} | changes)


class StandIn:
    """An agent that plays a plain function in a thread."""

    def __init__(self, talk: Callable[[str], Any], url: str) -> None:
        self._talk, self._url = talk, url

    async def __aenter__(self) -> StandIn:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def run(self, task: Any) -> Any:
        return await asyncio.to_thread(self._talk, self._url)


def played(monkeypatch: pytest.MonkeyPatch, talk: Callable[[str], Any], workers: int = 2) -> Sequence[Row]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(adapter, "_agent", lambda config, url: StandIn(talk, url))
    monkeypatch.setattr(
        adapter, "_tasks", lambda path, most: [SimpleNamespace(data=SimpleNamespace(prompt_text="12?"))]
    )
    config = Verifiers(taskset="x", eval_taskset="x", tokenizer="none", turn_timeout_s=20.0)
    collector = collector_of(group_size=2, workers=workers)
    collector = Collector(**vars(collector) | {"env": config, "env_timeout_s": 30.0})
    return collector(random_policy(), config.tasks("train", 0), KEY).rows


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_what_was_asked_and_answered(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that goes on is appended, any other one begins another row; log-probabilities are the sampler's."""
    heard: list[list[dict[str, Any]]] = []

    def talk(url: str) -> Any:
        first = post(url, PROMPT)
        second = post(url, [*PROMPT, *first["token_ids"], *MORE])
        third = post(url, OTHER)
        heard.append([first, second, third])
        return trace()

    rows = played(monkeypatch, talk, workers)
    assert [(row.episode, row.segment, row.ending) for row in rows] == [
        (0, 0, Ending.CUT), (0, 1, Ending.TERMINATED), (1, 0, Ending.CUT), (1, 1, Ending.TERMINATED),
    ]  # fmt: skip
    for one, two in (rows[:2], rows[2:]):
        (said,) = (h for h in heard if h[0]["token_ids"] == one.token[len(PROMPT) :][: len(h[0]["token_ids"])].tolist())
        a, b, c = (turn["token_ids"] for turn in said)
        assert one.token.tolist() == [*PROMPT, *a, *MORE, *b] and two.token.tolist() == [*OTHER, *c]
        logp = [p["logprob"] for turn in said for p in turn["logprobs"]["content"]]
        kept = np.concatenate([row.logp_behavior[row.action] for row in (one, two)])
        np.testing.assert_array_equal(kept, np.array(logp, np.float32))
        assert [t["finish_reason"] for t in said] == ["stop" if ids[-1] == EOS else "length" for ids in (a, b, c)]
        assert one.reward.sum() == 0 and two.reward.sum() == 0.75 and two.reward[-1] == 0.75
        assert two.info["success"] is False and two.info["reward/right"] == 0.75


def test_rollouts_that_fail_or_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a rollout are errors of its episode; a rollout at its last turn is truncated; so is a full row."""
    error = SimpleNamespace(type="TaskError", message="no box")

    def one_turn(result: Any) -> Callable[[str], Any]:
        return lambda url: (post(url, PROMPT), result)[1]

    failed = played(monkeypatch, one_turn(trace(ok=False, errors=[error])))
    assert {row.info["error_text"] for row in failed} == {"TaskError: no box"}
    assert {row.ending for row in played(monkeypatch, one_turn(trace(stop_condition="max_turns")))} == {
        Ending.TRUNCATED
    }
    early = played(monkeypatch, lambda url: trace(ok=False, errors=[error]))
    assert early[0].info["error_text"] == "the rollout ended before its first turn: TaskError: no box"
    long = played(monkeypatch, lambda url: (post(url, PROMPT), post(url, [*PROMPT] * 30)))
    assert {row.ending for row in long} == {Ending.TRUNCATED}
    wrong = played(monkeypatch, lambda url: post(url, [TOKENIZER.vocab_size]))
    assert (
        wrong[0].info["error"] == "ValueError"
        and "expected ids of this model's tokenizer" in wrong[0].info["error_text"]
    )
    broken = played(monkeypatch, lambda url: 1 / 0)
    assert "ZeroDivisionError" in broken[0].info["error_text"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(ConfigError, match=r"verifiers cannot be imported .*: pip install 'ppojax\[verifiers\]'"):
        Verifiers(taskset="x", tokenizer="y").tasks("train", 0)


def test_it_shortens_the_history_itself() -> None:
    asked = ("env.type=verifiers", "env.taskset=x", "env.tokenizer=y", "model.path=smollm2")
    with pytest.raises(
        ConfigError, match=r"writes its prompts as tokens, and shortens the history itself; set rollout"
    ):
        Config.load(*asked, "rollout.compaction.type=truncate")


TASKS = """
import verifiers.v1 as v1

class Data(v1.TaskData):
    answer: str = ""

class Sum(v1.Task[Data]):
    @v1.reward
    async def length(self, trace) -> float:
        return float(trace.num_turns)

class Sums(v1.Taskset[Sum, v1.TasksetConfig]):
    def load(self):
        for n in range(24):
            yield Sum(Data(prompt=f"{n}+1?", answer=str(n + 1)))

__all__ = ["Sums"]
"""
HARNESS = """
import httpx
import verifiers.v1 as v1

class Config(v1.HarnessConfig):
    pass

class Chat(v1.Harness[Config]):
    NEEDS_CONTAINER = EXECUTES_CODE = False
    APPENDS_SYSTEM_PROMPT = True

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **more):
        messages = [{"role": "user", "content": data.prompt}]
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            for _ in range(3):
                body = {"model": ctx.model, "messages": messages}
                reply = await client.post(f"{endpoint}/chat/completions", json=body, headers=headers)
                reply.raise_for_status()
                messages += [reply.json()["choices"][0]["message"], {"role": "user", "content": "and now?"}]
        return v1.ProgramResult(exit_code=0, stdout="", stderr="")

__all__ = ["Chat"]
"""


def test_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three turns of a harness, Qwen3's tokenizer, a policy of random weights."""
    pytest.importorskip("verifiers.v1", reason="verifiers is not installed: its rollouts were not tried")
    (tmp_path / "ppojax_test_sums.py").write_text(TASKS)
    (tmp_path / "ppojax_test_chat.py").write_text(HARNESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    folder = write_qwen3(tmp_path / "qwen3")
    tokenizer = tokenizer_from_hf(folder)
    spec = DecoderSpec(
        layers=1, width=8, heads=1, kv_heads=1, head_width=8, ffn=8, vocab=tokenizer.vocab_size, tied=True
    )
    model = ModelDef(spec, remat="none")
    config = Verifiers(
        taskset="ppojax_test_sums", harness="ppojax_test_chat", tokenizer=str(folder), renderer="qwen3", success_at=3.0
    )
    tasks = config.tasks("train", 0)
    assert len(tasks) + len(config.tasks("eval", 0)) == 24
    sampler = SamplerDef(model, sampler_of().mesh, positions=255, turn_tokens=8, segment=8)
    stop_SV = jax.numpy.asarray(stop_table(tokenizer.token_bytes(), (), tokenizer.eos_ids))
    play = Collector(config, tokenizer, sampler, stop_SV, 2, 64, 4, workers=4, env_timeout_s=60.0)
    rows = play(init(model, KEY), tasks[:2], KEY).rows
    ends = {row.episode: row for row in rows}
    assert len(ends) == 4
    for episode, last in ends.items():
        assert last.ending == Ending.TERMINATED, last.info
        assert last.info["success"] and last.info["reward/length"] == 3.0
        mine = [row for row in rows if row.episode == episode]
        assert sum(row.reward.sum() for row in mine) == 3.0 and sum(row.segment == 0 for row in mine) == 1
        # Three turns, each behind what the renderer wrote; the last prompt holds both earlier turns and questions.
        text = tokenizer.decode(last.token.tolist())
        assert text.count("and now?") == 2 and "+1?" in text
        assert sum(int((np.diff(row.action.astype(int), prepend=0) == 1).sum()) for row in mine) == 3
