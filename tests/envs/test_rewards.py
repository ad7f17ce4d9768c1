"""Parts of rewards by hand-written cases, their sum, and what happens when one of them fails."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ppojax.envs.rewards import Answered, Rewards
from ppojax.envs.rewards.function import Function
from ppojax.envs.rewards.judge import Judge, JudgeError
from ppojax.envs.rewards.preference import Preference
from ppojax.envs.rewards.rules import Exact, Form, Language, Length, Numeric
from ppojax.envs.rewards.served import ServedError
from ppojax.errors import ConfigError

TAGGED = "<think>a</think><answer>7</answer>"


def answered(extracted: str | None, answer: Any = "7", completion: str = TAGGED) -> Answered:
    said = {"role": "assistant", "content": completion, "tokens": len(completion)}
    return Answered(completion, extracted, answer, [{"role": "user", "content": "3+4?"}, said], {"level": 2})


@pytest.mark.parametrize(
    ("part", "extracted", "answer", "score"),
    [
        (Exact(), "New  York\n", "New York", 1),
        (Exact(), "new york", "New York", 0),
        (Exact(ignore_case=True), "new york", "New York", 1),
        (Exact(), "b", ["a", "b"], 1),
        (Exact(), "7", 7, 1),
        (Exact(), None, "None", 0),
        (Numeric(), "0.50", "1/2", 1),
        (Numeric(), "0.1", 0.1, 1),
        (Numeric(), "50%", 0.5, 1),
        (Numeric(), "49", ["48", 49], 1),
        (Numeric(), "seven", 7, 0),
        (Numeric(), None, 7, 0),
        (Numeric(), "3.15", "3.14159", 0),
        (Numeric(tolerance=0.01), "3.15", "3.14159", 1),
        (Numeric(relative_tolerance=0.01), "101", "100", 1),
        (Numeric(relative_tolerance=0.01), "102", "100", 0),
    ],
)
def test_answers(part: Exact | Numeric, extracted: str | None, answer: Any, score: float) -> None:
    assert part(answered(extracted, answer)) == score


def test_a_reference_that_is_no_number_is_a_fault() -> None:
    with pytest.raises(ValueError, match=r"the reference \['x'\] is not a number"):
        Numeric()(answered("7", "x"))


def test_math_verify_compares_expressions() -> None:
    part = Numeric(backend="math_verify")
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"math_verify: the package math-verify is missing: pip install 'ppojax"):
            part.load()
        pytest.skip("math-verify is not installed")
    assert part(answered(r"\frac{1}{2}", "0.5")) == 1
    assert part(answered("x+1", "1+x")) == 1
    assert part(answered("3", "4")) == 0
    assert Rewards(numeric=part).grade(answered("3", "3"))[0] == 1.0  # in a thread


def test_form_and_language() -> None:
    assert Form()(answered(None)) == 1
    assert Form()(answered(None, completion="7")) == 0
    assert Language()(answered(None, completion="abc 123 \u0431\u0432")) == pytest.approx(3 / 5)
    assert Language(script="cjk")(answered(None, completion="\u4f60\u597dab")) == 0.5
    assert Language()(answered(None, completion="57.")) == 1


def written(*tokens: int) -> Answered:
    """Turns of the policy of so many tokens, behind one that stands in the prompt."""
    turns = [{"role": "assistant", "content": "x", "tokens": n} for n in tokens]
    return Answered("x", None, messages=[{"role": "assistant", "content": "x" * 999}, *turns])


@pytest.mark.parametrize(("tokens", "score"), [(0, 0), (60, 0), (70, -0.25), (80, -0.5), (100, -1), (1000, -1)])
def test_overlong_answers_are_punished_softly(tokens: int, score: float) -> None:
    """DAPO eq. 13 with L_max = 100 and L_cache = 40."""
    assert Length(limit=100, margin=40)(written(tokens)) == score


def test_length_counts_every_turn_of_the_policy() -> None:
    assert Length(limit=100, margin=40)(written(40, 40)) == -0.5


def test_parts_are_weighted_and_logged() -> None:
    rewards = Rewards(exact=Exact(weight=2), form=Form(weight=0.5), length=Length(limit=10, margin=5, weight=0.25))
    total, info = rewards.grade(answered("7"))
    assert total == 2 + 0.5 - 0.25
    assert info == {"reward/exact": 1, "reward/form": 1, "reward/length": -1, "success": True}
    total, info = rewards.grade(answered("8", completion="8"))
    assert (total, info["success"], info["reward/form"]) == (0, False, 0)
    # Without a part that judges the answer, the others decide.
    assert Rewards(form=Form()).grade(answered(None))[1]["success"]
    assert Rewards(exact=Exact(), success_at=2).grade(answered("7"))[1]["success"] is False


def function(tmp_path: Path, code: str) -> Function:
    (tmp_path / "score.py").write_text(code)
    return Function(path=f"{tmp_path}/score.py:score")


def test_a_function_names_what_it_wants(tmp_path: Path) -> None:
    part = function(tmp_path, "def score(extracted, answer, *, record, scale=2): return scale * (extracted == answer)")
    total, info = Rewards(function=part, success_at=2).grade(answered("7"))
    assert (total, info) == (2, {"reward/function": 2, "success": True})


def test_a_function_gives_several_scores(tmp_path: Path) -> None:
    part = function(tmp_path, "def score(**a): return {'level': a['record']['level'], 'said': len(a['messages'])}")
    total, info = Rewards(function=part.model_copy(update={"weight": 0.5})).grade(answered("7"))
    assert total == 2
    assert info == {"reward/function/level": 2, "reward/function/said": 2, "reward/function": 4, "success": True}


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("def score(): raise KeyError('x')", KeyError, "x"),
        ("def score(): return float('nan')", ValueError, "function: expected a finite number, got nan"),
        ("def score(): return 'right'", ValueError, "function: expected a finite number, got 'right'"),
        ("def score(): return {'a': None}", ValueError, "function/a: expected a finite number, got None"),
        ("def score(): raise SystemExit(3)", SystemExit, "3"),
        ("import time\ndef score(): time.sleep(2)", TimeoutError, r"no answer within 0\.05 s"),
    ],
)
def test_a_part_that_fails(tmp_path: Path, code: str, error: type[BaseException], text: str) -> None:
    part = function(tmp_path, code)
    rewards = Rewards(exact=Exact(), function=part, timeout_s=0.05)
    start = time.perf_counter()
    with pytest.raises(error, match=text):
        rewards.grade(answered("7"))
    total, info = rewards.model_copy(update={"failed_score": -0.5}).grade(answered("7"))
    assert time.perf_counter() - start < 1
    assert total == 0.5
    scores = {"reward/exact": 1, "reward/function": -0.5, "success": False}
    assert info == scores | {"failed/exact": 0, "failed/function": 1}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("score", r"env.reward.function.path=score: expected module:function or file.py:function"),
        ("nowhere.py:score", r"nowhere.py: no such file; the path is taken from /"),
        ("no_such_module_x:f", r"no_such_module_x cannot be imported \(ModuleNotFoundError: No module named 'no_such"),
        ("json:nothing", r"json has no function nothing; expected one of: .*loads"),
        ("{tmp}/bad.py:f", r"bad.py cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("{tmp}/args.py:f", r"takes reply, args; expected arguments by name, among completion, extracted, answer, mes"),
    ],
)
def test_functions_that_cannot_be_used(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / "bad.py").write_text("1 / 0")
    (tmp_path / "args.py").write_text("def f(answer, reply, *args): pass")
    with pytest.raises(ConfigError, match=text) as caught:
        Rewards(function=Function(path=path.replace("{tmp}", str(tmp_path)))).load()
    assert "\n" not in str(caught.value)


def test_modules_are_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores_here.py").write_text("def score(completion): return 3")
    monkeypatch.chdir(tmp_path)
    assert Rewards(function=Function(path="my_scores_here:score")).grade(answered("7"))[0] == 3


class Model(BaseHTTPRequestHandler):
    """A judge: it answers `reply`, after `pause` seconds."""

    reply: Any = "score: 10"
    status = 200
    pause = 0.0
    seen: list[tuple[Any, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, {**body, "key": self.headers["Authorization"]}))
        time.sleep(self.pause)
        self.send_response(200 if self.status == 503 and len(self.seen) > 1 else self.status)
        self.end_headers()
        reply = self.reply if isinstance(self.reply, dict) else {"choices": [{"message": {"content": self.reply}}]}
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Model], str]]:
    monkeypatch.setenv("no_proxy", "*")
    handler = type("OneModel", (Model,), {"seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_is_asked_over_http(model: tuple[type[Model], str], tmp_path: Path) -> None:
    handler, url = model
    (tmp_path / "key").write_text("secret\n")
    handler.reply = "I give a score: 2, no: it is right.\n**Score:** 7.5"
    judge = Judge(url=url, model="m", key_file=f"{tmp_path}/key", prompt="{question}|{answer}|{completion}")
    assert judge(answered("7", completion="{answer}{x}")) == 0.75
    path, body = handler.seen[0]
    assert (path, body["model"], body["key"]) == ("/v1/chat/completions", "m", "Bearer secret")
    assert body["messages"] == [{"role": "user", "content": "3+4?|7|{answer}{x}"}]
    handler.reply = "score: 11"
    assert Rewards(judge=judge).grade(answered("7")) == (1.0, {"reward/judge": 1.0, "success": True})


def test_a_judge_that_fails(model: tuple[type[Model], str], monkeypatch: pytest.MonkeyPatch) -> None:
    handler, url = model
    monkeypatch.setattr(time, "sleep", lambda s: None)
    handler.status = 503  # the first time only
    assert Judge(url=url, model="m")(answered("7")) == 1
    handler.status = 200
    for reply, text in (("no", r'expected "score: N" in the reply, got \'no\''), (None, "expected a text as content")):
        handler.reply = reply
        with pytest.raises(JudgeError, match=text):
            Judge(url=url, model="m", tries=1)(answered("7"))
    handler.status, before = 401, len(handler.seen)
    with pytest.raises(JudgeError, match="HTTP Error 401"):
        Judge(url=url, model="m", tries=5)(answered("7"))
    assert len(handler.seen) == before + 1
    with pytest.raises(JudgeError, match="refused"):
        Judge(url="http://127.0.0.1:9/v1", model="m")(answered("7"))


def test_a_slow_judge_runs_out_of_time(model: tuple[type[Model], str]) -> None:
    handler, url = model
    handler.pause = 0.3
    with pytest.raises(JudgeError, match="timed out"):
        Judge(url=url, model="m", timeout_s=0.05, tries=1)(answered("7"))
    with pytest.raises(TimeoutError):
        Rewards(judge=Judge(url=url, model="m"), timeout_s=0.05).grade(answered("7"))


@pytest.mark.parametrize(
    ("scored", "odds", "score"),
    [
        ({"data": [[0.3], [math.log(3)]]}, True, 0.75),  # one score a token: the last
        ({"data": [2.0]}, False, 2.0),
        ({"probs": [0.9]}, False, 0.9),
        ({"score": -1e6}, True, 0.0),
    ],
)
def test_a_reward_model_is_asked_for_the_whole_conversation(
    model: tuple[type[Model], str], scored: Any, odds: bool, score: float
) -> None:
    """exp(r) / (1 + exp(r)) of r = ln 3 is 3/4."""
    handler, url = model
    handler.reply = {"data": [scored]}
    part = Preference(url=f"{url}/pooling", model="m", odds=odds)
    assert part(answered("7", completion="x")) == pytest.approx(score)
    path, body = handler.seen[0]
    said = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "x"}]
    assert (path, body["model"], body["messages"]) == ("/v1/pooling", "m", said)
    total, info = Rewards(exact=Exact(), preference=part.model_copy(update={"weight": 0.5})).grade(answered("7"))
    assert total == pytest.approx(1 + 0.5 * score) and info["reward/preference"] == pytest.approx(score)
    assert info["success"]  # which a preference does not decide


def test_a_reward_model_that_fails(model: tuple[type[Model], str]) -> None:
    handler, url = model
    for reply in ({"data": []}, {"data": [{"probs": []}]}, {"data": [{"data": "no"}]}, {"error": "x"}):
        handler.reply = reply
        with pytest.raises(ServedError, match=r"expected data\[0\] with data, probs or score, got"):
            Preference(url=url, model="m", tries=1)(answered("7"))
    with pytest.raises(ConfigError, match=r"env\.reward\.preference\.key_file=/no/key: cannot be read"):
        Rewards(preference=Preference(url="http://x", model="m", key_file="/no/key")).load()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Rewards(), "there is no reward: give one or more of exact, numeric, form, language, length, function"),
        (lambda: Length(limit=5, margin=6), r"margin \(6\) must be at most limit \(5\)"),
        (lambda: Judge(url="localhost:8000", model="m"), "expected an address such as http://localhost:8000/v1"),
        (lambda: Judge(url="http://x", model="m", prompt="?"), "expected a text with {completion}"),
    ],
)
def test_errors_of_settings(make: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        make()


def test_a_key_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match=r"key_file=/no/key: cannot be read \(No such file or directory\)"):
        Rewards(judge=Judge(url="http://x", model="m", key_file="/no/key")).load()
