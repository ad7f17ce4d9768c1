"""Where the answer stands in what a policy wrote, and whether two answers are the same."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from ppojax.envs.tool_calls import TOOL_FORMATS, split_thinking

AnswerFormat = Literal["whole", "line", "number", "tags", "think_tags", "boxed", "hashes"]

# What a system message says of each, for policies that have not learnt it yet.
INSTRUCTIONS: dict[AnswerFormat, str] = {
    "whole": "Reply with the answer and nothing else.",
    "line": "Give the answer alone on the last line.",
    "number": "End with the answer as a number.",
    "tags": "Give the answer as <answer>...</answer>.",
    "think_tags": "Think first, as <think>...</think>, then give the answer as <answer>...</answer>.",
    "boxed": "Give the answer as \\boxed{...}.",
    "hashes": "End with a line of #### and the answer.",
}

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?<![\w.])[-+]?(?:{_DIGITS})(?:[eE][-+]?[0-9]+|/[0-9]+)?")
_VALUE = re.compile(rf"[-+]?(?:{_DIGITS})(?:[eE][-+]?[0-9]{{1,3}}|/[0-9]+)?|[-+]?[0-9]+\.")
_THINK_TAGS = re.compile(r"\s*(?:<think>)?(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_TAGS = re.compile(r".*<answer>(.*)</answer>\s*", re.DOTALL)
_MINUS = "\u2212"


def spoken(text: str) -> str:
    """Leave out thinking: what stands before `</think>`, or on gpt-oss's channel for it."""
    return TOOL_FORMATS["harmony"].parse(text).content if "<|message|>" in text else split_thinking(text)[1]


def extract(text: str, how: AnswerFormat) -> str | None:
    """Find the answer in a text; None where there is none.

    `whole`: all of the text. `line`: its last line that is not empty. `number`: its last number. `tags`: the last
    `<answer>...</answer>`; `think_tags`: the same. `boxed`: the last `\\boxed{...}`, braces matched. `hashes`: what
    follows the last `####` on its line. Thinking is never looked at.
    """
    text = spoken(text)
    match how:
        case "whole":
            return text.strip() or None
        case "line":
            return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)
        case "number":
            found = _NUMBER.findall(text.replace(_MINUS, "-"))
            return found[-1] if found else None
        case "tags" | "think_tags":
            before, closed, _ = text.rpartition("</answer>")
            _, opened, answer = before.rpartition("<answer>")
            return answer.strip() if closed and opened else None
        case "boxed":
            return _boxed(text)
        case "hashes":
            _, marked, answer = text.rpartition("####")
            return (answer.strip().splitlines() or [""])[0].strip() or None if marked else None


def well_formed(text: str, how: AnswerFormat) -> bool:
    """Tell whether a whole text has the form that `how` asks for, each tag once and in its place.

    For `think_tags` the opening `<think>` may be missing: some chat templates write it into the prompt.
    """
    match how:
        case "think_tags":
            found = _THINK_TAGS.fullmatch(text)
            return found is not None and not any(re.search(r"</?(?:think|answer)>", part) for part in found.groups())
        case "tags":
            rest = spoken(text)
            return _TAGS.fullmatch(rest) is not None and rest.count("<answer>") == rest.count("</answer>") == 1
        case "boxed" | "hashes":
            return text.count({"boxed": "\\boxed{", "hashes": "####"}[how]) == 1 and extract(text, how) is not None
        case _:
            return extract(text, how) is not None


def number(text: str) -> Fraction | None:
    """Read a number: `1,024`, `-3.5`, `2/3`, `6.02e23`, `50%`, `$12`, `\\frac{1}{2}`; None where it is none.

    Exact, so that 0.1 and 1/10 are the same. A percent sign divides by 100.
    """
    text = text.strip().rstrip(".").replace(_MINUS, "-").strip("$ ").replace("\\%", "%")
    text = re.sub(r"^(-?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}$", r"\1\2/\3", text)
    percent = text.endswith("%")
    text = text.rstrip("% ").replace("$", "")
    text = re.sub(r"\s*/\s*", "/", text)
    if len(text) > 100 or not _VALUE.fullmatch(text):
        return None
    try:
        value = Fraction(text.replace(",", ""))
    except ZeroDivisionError:
        return None
    return value / 100 if percent else value


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for at, character in enumerate(text[begin:], begin):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[begin:at].strip()
    return None
