"""Grading by hand-written cases, tasks by their properties."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ppojax.envs import Calculator, Task
from ppojax.envs.arithmetic import ArithmeticSyntaxError, evaluate, parse
from ppojax.envs.calculator import answers

TASK = Task("t", {"a": 12, "b": 45, "operator": "+"})


def say(text):
    return {"role": "assistant", "content": text}


def play(config, *texts, task=TASK):
    env = config.make()
    env.reset(task)
    return [env.step(say(text)) for text in texts]


@pytest.mark.parametrize(
    "text",
    [
        "<calc>12+45</calc>",
        "<calc>45+12</calc>",
        "<calc> 12 + 45 </calc>",
        "Let me see: <calc>12+45</calc>\n",
        "<calc>012+(45)</calc>",
    ],
)
def test_right_calls_are_rewarded_and_answered(text):
    (step,) = play(Calculator(), text)
    assert (step.reward, step.terminated, step.truncated) == (0.5, False, False)
    assert step.messages == [{"role": "tool", "content": "57"}]
    assert step.info["call_ok"]


@pytest.mark.parametrize(
    "text",
    [
        "<calc>12+46</calc>",
        "<calc>12-45</calc>",
        "<calc>57</calc>",
        "<calc>12+45+0</calc>",
        "<calc>-12+45</calc>",
        "<calc>12*45</calc>",
    ],
)
def test_calls_of_something_else_get_their_result_and_no_reward(text):
    (step,) = play(Calculator(), text)
    assert step.reward == 0.0
    assert not step.terminated
    assert step.messages == [{"role": "tool", "content": str(evaluate(parse(text[6:-7])))}]
    assert (step.info["call_ok"], step.info["wrong"], step.info["malformed"]) == (False, 1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "<calc>12+45",
        "12+45</calc>",
        "<calc></calc>",
        "<calc>12+</calc>",
        "<calc>a+b</calc>",
        "<calc>twelve plus 45</calc>",
        "<calc>12+45</calc> is 57",
        "<calc>12+45</calc><calc>12+45</calc>",
        "<calc><calc>12+45</calc>",
        "</calc><calc>12+45</calc>",
        "<calc>12+45=57</calc>",
        "<calc>__import__('os')</calc>",
        "<calc>" + "9" * 500 + "+1</calc>",
        "<calc>9999999999999999999+1</calc>",
        "<calc>" + "(" * 30 + "1" + ")" * 30 + "</calc>",
        "<calc>2**99</calc>",
        "<calc>1\u0662+45</calc>",
    ],
)
def test_malformed_calls_get_an_error_and_are_counted(text):
    (step,) = play(Calculator(), text)
    assert step.reward == 0.0
    assert not step.terminated
    assert step.messages[0]["role"] == "tool"
    assert step.messages[0]["content"].startswith("error")
    assert (step.info["call_ok"], step.info["wrong"], step.info["malformed"]) == (False, 0, 1)


def test_a_wrong_call_can_end_the_episode():
    (step,) = play(Calculator(on_wrong_call="end"), "<calc>1+1</calc>")
    assert step.terminated
    assert step.messages == []
    (step,) = play(Calculator(on_wrong_call="end"), "<calc>12+45</calc>")
    assert not step.terminated


@pytest.mark.parametrize("text", ["57", "57.", "The answer is 57!", " 57\n", "It is 57, I think"])
def test_right_answers(text):
    _, step = play(Calculator(), "<calc>12+45</calc>", text)
    assert (step.reward, step.terminated, step.messages) == (0.5, True, [])
    assert step.info["success"] is True
    assert step.info["answer_ok"] is True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fifty-seven",
        "12+45",
        "12+45=57",
        "57 or 58",
        "57 57",
        "57.0",
        "57.5",
        "-57",
        "\u221257",
        "057",
        "1,057",
        "5 7",
    ],
)
def test_other_answers(text):
    _, step = play(Calculator(), "<calc>12+45</calc>", text)
    assert (step.reward, step.terminated) == (0.0, True)
    assert step.info["success"] is False
    assert step.info["call_ok"] is True


def test_numbers_with_thousands_separators_and_signs():
    assert answers("It is 1,024.", 1024)
    assert answers("-33", -33)
    assert answers("\u221233", -33)
    assert not answers("10,24", 1024)
    assert not answers("33", -33)


@pytest.mark.parametrize("first", ["57", "", "The answer is 57.", "calc(12+45)"])
def test_an_answer_without_a_call_ends_with_nothing(first):
    (step,) = play(Calculator(), first)
    assert (step.reward, step.terminated) == (0.0, True)
    assert step.info["success"] is False


def test_the_answer_needs_the_right_call_and_not_any_call():
    _, step = play(Calculator(), "<calc>50+7</calc>", "57")
    assert (step.reward, step.info["success"]) == (0.0, False)


def test_the_call_is_rewarded_once_and_may_be_corrected():
    first, second = play(Calculator(), "<calc>1+1</calc>", "<calc>12+45</calc>")
    assert (first.reward, second.reward, second.terminated) == (0.0, 0.5, True)
    steps = play(Calculator(max_turns=4), "<calc>12+45</calc>", "<calc>12+45</calc>", "57")
    assert [s.reward for s in steps] == [0.5, 0.0, 0.5]
    assert steps[-1].info["wrong"] == 1


def test_a_subtraction_must_keep_its_order():
    task = Task("t", {"a": 12, "b": -45, "operator": "-"})
    config = Calculator(operators=("-",), low=-99)
    assert config.make().reset(task).messages[-1]["content"] == "12-(-45)=?"
    assert play(config, "<calc>12-(-45)</calc>", task=task)[0].reward == 0.5
    assert play(config, "<calc>12--45</calc>", task=task)[0].reward == 0.5
    assert play(config, "<calc>-45-12</calc>", task=task)[0].reward == 0.0


def test_the_last_turn_terminates():
    steps = play(Calculator(max_turns=1), "<calc>12+45</calc>")
    assert (steps[0].reward, steps[0].terminated, steps[0].truncated) == (0.5, True, False)


@given(st.integers(0, 65_535), st.sampled_from(["+", "-", "*"]), st.sampled_from(["train", "eval"]))
def test_the_expert_always_succeeds(index, operator, split):
    config = Calculator(operators=(operator,), low=-20, high=99)
    task = config.tasks(split, 3)[index % (256 if split == "eval" else 65_536)]
    env = config.make()
    messages = list(env.reset(task).messages)
    total = 0.0
    for _ in range(config.max_turns):
        text = config.expert(messages, task)
        step = env.step(say(text))
        messages += [say(text), *step.messages]
        total += step.reward
    assert total == 1.0
    assert step.terminated
    assert step.info["success"]


def test_the_expert_calls_again_after_an_error():
    config = Calculator(max_turns=3)
    (step,) = play(config, "<calc>x</calc>")
    assert config.expert(step.messages, TASK) == "<calc>12+45</calc>"


def test_tasks_follow_from_split_seed_and_index():
    config = Calculator()
    tasks, again = config.tasks("train", 1), config.tasks("train", 1)
    assert len(tasks) == 65_536
    assert tasks[777] == again[777] == again[700:800][77]
    assert tasks[777].id != config.tasks("train", 2)[777].id
    assert [t.data for t in tasks[:20]] != [t.data for t in config.tasks("train", 2)[:20]]
    assert len(config.tasks("eval", 1)[:8]) == 8
    with pytest.raises(IndexError):
        tasks[65_536]


def test_no_pair_of_operands_is_in_both_splits():
    config = Calculator(low=10, high=99)

    def pairs(split, seed, n):
        return {tuple(sorted((t.data["a"], t.data["b"]))) for t in config.tasks(split, seed)[:n]}

    train, evaluation = pairs("train", 0, 3000) | pairs("train", 1, 3000), pairs("eval", 0, 256) | pairs("eval", 5, 256)
    assert not train & evaluation
    assert len(evaluation) > 200
    assert all(10 <= n <= 99 for pair in train | evaluation for n in pair)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"low": 9, "high": 8}, r"low \(9\) must be at most high \(8\)"),
        ({"low": 1, "high": 1}, r"low \(1\) to high \(1\) has too few pairs .*: widen the range"),
        ({"prompt": "Add."}, r"prompt \('Add\.'\) must contain \{question\}"),
        ({"operators": ("+", "+")}, "must not repeat"),
        ({"operators": ("/",)}, "Input should be"),
        ({"operators": ()}, "at least 1 item"),
        ({"max_turns": 0}, "greater than or equal to 1"),
        ({"reward_call": float("nan")}, "finite number"),
    ],
)
def test_errors_of_settings(settings, text):
    with pytest.raises(ValidationError, match=text):
        Calculator(**settings)


@given(st.text(alphabet="0123456789+-*() ", max_size=40))
def test_arithmetic_agrees_with_python(text):
    try:
        value = evaluate(parse(text))
    except ArithmeticSyntaxError:
        return
    # Python refuses leading zeros, which mean nothing here.
    assert value == eval(re.sub(r"\b0+(?=\d)", "", text.strip()))


@pytest.mark.parametrize(("text", "value"), [("2-3-4", -5), ("2-3*4", -10), ("(2-3)*4", -4), ("2--3", 5), ("-7", -7)])
def test_arithmetic(text, value):
    assert evaluate(parse(text)) == value


def test_settings_are_hashable_and_import_no_jax():
    assert hash(Calculator()) == hash(Calculator())
    code = "import ppojax.envs, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_prompt_shows_one_call_that_is_never_asked():
    config = Calculator(low=23, high=50, example=(23, 45))
    *shown, asked = config.make().reset(TASK).messages
    assert shown == [
        {"role": "system", "content": "Use calc tags."},
        {"role": "user", "content": config.prompt.replace("{question}", "23+45")},
        {"role": "assistant", "content": "<calc>23+45</calc>"},
    ]
    assert asked == {"role": "user", "content": config.prompt.replace("{question}", "12+45")}
    for split in ("train", "eval"):
        assert not any({t.data["a"], t.data["b"]} == {23, 45} for t in config.tasks(split, 0)[:3000])
    assert len(Calculator(example=None, system="").make().reset(TASK).messages) == 1
