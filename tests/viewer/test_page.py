"""The static page: its structure, its colours, and that nothing of it obeys the model."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from html_page import Page
from ppojax.types import Ending
from ppojax.viewer.colours import LEVELS, Scale, colour, level
from ppojax.viewer.episode import Token
from ppojax.viewer.page import SCRIPT, STYLE, figure, page
from ppojax.viewer.run import StepFile, find_steps
from viewer_run import HOSTILE, row, small_run, write_step


def draw(run: Path, number: int = 0, step: int = 0, **kwargs) -> tuple[str, Page]:
    file = StepFile(find_steps(str(run))[step])
    text = page("a page", figure(file.episode(file.find(number)), file.scale, title="an episode", **kwargs))
    return text, Page(text)


def test_a_page_holds_the_episode(tmp_path: Path) -> None:
    _, found = draw(small_run(tmp_path / "run"))
    tokens = found.all("b", "i")
    assert [(tag, text) for tag, _, text in tokens] == [
        *(("i", "Q"), ("b", "a"), ("b", "b\u21b5\n")),
        *(("i", "OBS"), ("b", "c"), ("b", "d")),
    ]
    heads = [text for _, attrs, text in found.all("div") if attrs["class"] == "head"]
    assert heads == ["context, 1 tokens", "turn 1, 2 tokens", "observation, 1 tokens", "turn 2, 2 tokens, reward 1"]
    [facts] = [text for _, attrs, text in found.all("p") if attrs.get("class") == "facts"]
    assert facts == "step 1, group 0, episode 0: terminated, reward 1, 2 turns, 6 tokens"
    assert [attrs.get("checked", "no") for _, attrs, _ in found.all("input")] == [None, "no", "no", "no"]
    labels = {attrs["for"] for _, attrs, _ in found.all("label")}
    assert labels == {attrs["id"] for _, attrs, _ in found.all("input")} == {"e_a", "e_v", "e_r", "e_m"}


def test_rows_of_a_chain_have_a_rule_between(tmp_path: Path) -> None:
    text, found = draw(small_run(tmp_path / "run"), 2)
    assert [t for _, attrs, t in found.all("div") if attrs["class"] == "row"] == [
        "row 1: the context was compacted, value 0.3 before it"
    ]
    assert text.index(">s</b>") < text.index("row 1:") < text.index(">end</b>")
    assert "terminated, reward -0.5, 2 turns, 6 tokens, 2 rows" in text
    assert re.search('class=cut d="M[0-9.]+ 8v', text)
    [held] = [t for _, attrs, t in found.all("b") if "m3" in (attrs.get("class") or "")]
    assert held == "sum"
    assert "value 0.2 of what would follow" in draw(tmp_path / "run", 3)[0]
    assert "error (TimeoutError)" in draw(tmp_path / "run", 1)[0]


def test_colours_are_the_numbers(tmp_path: Path) -> None:
    """Every class of every token is computed again from the file, with formulas of its own."""
    run = small_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "rollouts/step_000001.jsonl").read_text().splitlines()]
    known = [a for r in rows for a, on in zip(r["advantage"], r["action"], strict=True) if on and a]
    logs = [math.log(x) for r in rows for x, on in zip(r["ratio"], r["action"], strict=True) if on]
    full, full_log = (2 * np.sqrt(np.mean(np.square(x))) for x in (known, logs))
    inside = [v for r in rows for v, on in zip(r["value"][0], r["action"], strict=True) if on]
    low, high = min(inside), max(inside)
    _, found = draw(run)
    got = [attrs.get("class", "") for tag, attrs, _ in found.all("b", "i")]
    r = rows[0]
    for i, classes in enumerate(got):
        names = set((classes or "").split())
        if not r["action"][i]:
            assert not names
            continue
        expected = {
            "a": round(5 * np.clip(r["advantage"][i] / full, -1, 1)),
            "r": round(5 * np.clip(math.log(r["ratio"][i]) / full_log, -1, 1)),
            "v": round(5 * (r["value"][0][i] - low) / (high - low)),
            "m": 2 if r["advantage"][i] == 0 else 0,
        }
        assert names == {f"{key}{at}" for key, at in expected.items() if at}, i
    assert {"a-4", "a4"} <= {name for classes in got for name in (classes or "").split()}


def test_every_class_has_its_colour() -> None:
    for name in ("a-5", "a1", "r-3", "r5", "v5", "m2", "m3"):
        assert re.search(rf":checked~\.text \.{name},\.legend \.{name}\{{background:rgb\(", STYLE), name
    assert ".a0" not in STYLE and ".v-" not in STYLE
    more, less = colour("advantage", 2), colour("advantage", -2)
    assert more[0] != less[0] and more[1] == less[1] < colour("advantage", LEVELS)[1]


@pytest.mark.parametrize(
    ("quantity", "fields", "expected"),
    [
        ("advantage", {"advantage": 0.5}, 2),
        ("advantage", {"advantage": -7.0}, -5),
        ("advantage", {"advantage": None}, 0),
        ("ratio", {"ratio": 1.0}, 0),
        ("ratio", {"ratio": math.e}, 5),
        ("ratio", {"ratio": 0.0}, -5),
        ("ratio", {"ratio": None}, 0),
        ("value", {"value": -1.0}, 0),
        ("value", {"value": 3.0}, 5),
        ("mask", {}, 1),
        ("mask", {"advantage": 0.0}, 2),
        ("mask", {"trained": False}, 2),
        ("mask", {"held": True}, 3),
        ("mask", {"held": True, "advantage": 0.0}, 2),
        ("mask", {"held": True, "trained": False}, 2),
        ("mask", {"action": False, "trained": False}, 0),
    ],
)
def test_levels(quantity: str, fields: dict, expected: int) -> None:
    token = Token(
        **{"id": 1, "text": "a", "action": True, "trained": True, "segment": 0, "turn": 1, "reward": 0.0, **fields}
    )
    assert level(quantity, token, Scale(1.25, 1.0, -1.0, 3.0)) == expected


def test_the_curve_is_the_values(tmp_path: Path) -> None:
    text, _ = draw(small_run(tmp_path / "run", critics=2))
    [line] = re.findall(r'class=vl d="M([^"]*)"', text)
    points = [tuple(map(float, p.split())) for p in line.split("L")]
    # Five tokens from the first action on, of a value that rises evenly: a straight line, to the right and up.
    assert len(points) == 5
    assert np.ptp(np.diff(np.array(points), axis=0), axis=0) == pytest.approx([0, 0], abs=0.2)
    assert points[0][0] < points[1][0] and points[0][1] > points[1][1]
    assert 'class=band d="M' in text and "mean of 2 critics" in text
    assert text.count("<circle") == 1 and "<title>reward 1</title>" in text
    assert len(re.findall(r'class=dn stroke-width="[^"]*" d="M[^"M]*v[^"M]*"', text)) == 1  # one advantage below 0


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    text, found = draw(small_run(tmp_path / "run", critics=0, ratio=False))
    assert "no value was recorded: the run has no critic" in text and "no ratio was recorded" in text
    assert "class=vl" not in text and "advantage" in text
    [data] = [json.loads(t) for tag, attrs, t in found.all("script") if attrs.get("type") == "application/json"]
    assert set(data) == {"id", "logp", "advantage", "reward"}
    assert data["id"] == [100, 101, 102, 103, 104, 105] and data["reward"] == {"5": 1}
    assert data["advantage"] == [1, -1, 0.5, 0]


def hostile_run(tmp_path: Path) -> Path:
    n = len(HOSTILE)
    r = row(HOSTILE, "0" + "1" * (n - 1), ending=Ending.ERROR, info={"error": HOSTILE[4] + HOSTILE[0]})
    write_step(tmp_path, 1, [r], [HOSTILE], advantage_BT=np.ones((1, n), np.float32))
    return tmp_path


def test_nothing_of_the_model_is_obeyed(tmp_path: Path) -> None:
    text, found = draw(hostile_run(tmp_path))
    assert {tag for tag, _, _ in found.elements} == {
        *("html", "head", "meta", "title", "style", "body", "section", "h2", "p", "svg", "path", "g", "text"),
        *("input", "label", "div", "span", "b", "i", "output", "script"),
    }
    scripts = [(attrs, t) for tag, attrs, t in found.all("script")]
    assert [attrs for attrs, _ in scripts] == [{"type": "application/json"}, {}]
    assert scripts[1][1] == SCRIPT and "<" not in scripts[0][1]
    for tag, attrs, _ in found.elements:
        assert not any(name.startswith("on") or name in ("src", "href", "style") for name in attrs), (tag, attrs)
    shown = "".join(t for _, _, t in found.all("b", "i"))
    assert "<script>alert(1)</script>" in shown and "javascript:alert(5)" in shown and "\\x1b[2J" in shown
    assert r"\u202egnp.exe" in shown and r"\x00\x9b31m\ud800\u2028" in shown
    assert all(c in "\n" or c.isprintable() for c in text)
    text.encode()  # no lone surrogate is left


def test_titles_are_text(tmp_path: Path) -> None:
    file = StepFile(find_steps(str(small_run(tmp_path / "run")))[0])
    bad = "</title><script>alert(6)</script>\x1b"
    found = Page(page(bad, figure(file.episode(file.find(0)), file.scale, title=bad)))
    assert [t for _, _, t in found.all("h2")] == [bad.replace("\x1b", "\\x1b")]
    assert len(found.all("script")) == 2


def test_the_page_lets_only_its_own_script_run(tmp_path: Path) -> None:
    text, found = draw(small_run(tmp_path / "run"))
    [policy] = [attrs["content"] for _, attrs, _ in found.all("meta") if "http-equiv" in attrs]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'")
    assert not re.search(r"https?:|url\(|@import|innerHTML", text)
    assert "prefers-color-scheme:dark" in text


def test_two_figures_share_a_page(tmp_path: Path) -> None:
    file = StepFile(find_steps(str(small_run(tmp_path / "run")))[0])
    parts = [figure(file.episode(e), file.scale, title="t", name=f"e{e.number}", shown="value") for e in file.episodes]
    found = Page(page("four", "".join(parts)))
    ids = [attrs["id"] for _, attrs, _ in found.all("input")]
    assert len(set(ids)) == 16 and len(found.all("section")) == 4 and len(found.all("style")) == 1
    with pytest.raises(AssertionError):
        figure(file.episode(file.find(0)), file.scale, title="t", name="a b")


def test_a_token_costs_little(tmp_path: Path) -> None:
    n = 5000
    rng = np.random.default_rng(0)
    texts = [f"{i % 10} w" for i in range(n)]
    r = row(texts, "0" * 100 + "1" * (n - 100))
    numbers = rng.normal(size=(1, n)).astype(np.float32)
    write_step(tmp_path, 1, [r], [texts], advantage_BT=numbers, value_MBT=numbers[None], ratio_BT=np.exp(numbers))
    text, _ = draw(tmp_path)
    assert len(text) / n < 85
    assert len(re.findall("<svg.*?</svg>", text, re.S)[0]) < 30_000
