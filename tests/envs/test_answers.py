"""Where answers are found, by hand-written texts."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ppojax.envs.answers import INSTRUCTIONS, AnswerFormat, extract, number, well_formed


@pytest.mark.parametrize(
    ("how", "text", "answer"),
    [
        ("whole", " 57 \n", "57"),
        ("whole", "<think>12+45</think>\n57", "57"),
        ("whole", "<think>never ends 57", None),
        ("whole", " ", None),
        ("whole", "<|channel|>analysis<|message|>57?<|end|><|start|>assistant<|channel|>final<|message|>58", "58"),
        ("line", "so\n\nOslo\n \n", "Oslo"),
        ("line", "", None),
        ("number", "12 + 45 is 57.", "57"),
        ("number", "It is -1,024.5!", "-1,024.5"),
        ("number", "\u22123", "-3"),
        ("number", "between 1/2 and 2/3", "2/3"),
        ("number", "about 6e23", "6e23"),
        ("number", "v1.2.3 of a_4", None),
        ("tags", "<answer>1</answer> no, <answer> 2\n</answer>.", "2"),
        ("tags", "<think><answer>1</answer></think>none", None),
        ("tags", "<answer>1", None),
        ("tags", "1</answer>", None),
        ("tags", "<answer></answer>", ""),
        ("think_tags", "<think>\n1?\n</think>\n<answer>2</answer>", "2"),
        ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}} so", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1", None),
        ("boxed", "1", None),
        ("hashes", "1 + 1\n#### 2 \nok", "2"),
        ("hashes", "####", None),
        ("hashes", "2", None),
    ],
)
def test_where_the_answer_stands(how: AnswerFormat, text: str, answer: str | None) -> None:
    assert extract(text, how) == answer


@pytest.mark.parametrize(
    ("how", "text", "good"),
    [
        ("think_tags", "<think>a</think><answer>b</answer>", True),
        ("think_tags", "a\n</think>\n\n<answer>b</answer>\n", True),  # opened by the prompt
        ("think_tags", "<answer>b</answer>", False),
        ("think_tags", "<think>a</think><answer>b</answer> and more", False),
        ("think_tags", "<think>a</think> so <answer>b</answer>", False),
        ("think_tags", "<think>a<think>b</think><answer>c</answer>", False),
        ("think_tags", "<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("think_tags", "<answer>b</answer><think>a</think>", False),
        ("tags", "It is <answer>b</answer>", True),
        ("tags", "<think>a</think><answer>b</answer>", True),
        ("tags", "<answer>b</answer>.", False),
        ("tags", "<answer>b</answer><answer>b</answer>", False),
        ("boxed", r"so \boxed{1}", True),
        ("boxed", r"\boxed{1} \boxed{2}", False),
        ("hashes", "#### 2", True),
        ("number", "2", True),
        ("number", "two", False),
    ],
)
def test_forms(how: AnswerFormat, text: str, good: bool) -> None:
    assert well_formed(text, how) is good


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("57", 57),
        ("+1,024.50", Fraction(2049, 2)),
        ("-.5", Fraction(-1, 2)),
        ("3.", 3),
        ("2 / 3", Fraction(2, 3)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("$12", 12),
        ("50 %", Fraction(1, 2)),
        (r"5\%", Fraction(1, 20)),
        ("1e-3", Fraction(1, 1000)),
        *((text, None) for text in ["", "x", "1 2", "10,24", "1/0", "inf", "nan", "1_000", "\u0663", "1e9999"]),
    ],
)
def test_numbers(text: str, value: Fraction | None) -> None:
    assert number(text) == value


def test_every_form_has_an_instruction() -> None:
    assert all(text.endswith(".") for text in INSTRUCTIONS.values())
