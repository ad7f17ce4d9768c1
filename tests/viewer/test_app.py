"""The viewer on the terminal, driven by keys as a person would."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from rich.cells import cell_len
from rich.style import Style
from rich.text import Text
from textual.color import Color
from textual.pilot import Pilot
from textual.widgets import Input, Static

from ppojax.types import Ending
from ppojax.viewer.app import Viewer
from ppojax.viewer.characters import visible
from ppojax.viewer.colours import colour
from ppojax.viewer.run import StepFile, find_steps
from ppojax.viewer.widgets import Listing, TokenView, ValueLine, arrange
from viewer_run import HOSTILE, row, small_run, write_step

T = TypeVar("T")


def play(
    run: Path, body: Callable[[Viewer, Pilot], Awaitable[T]], *, step: int = 0, size: tuple[int, int] = (120, 30)
) -> T:
    """Open the viewer and do something in it."""

    async def go() -> T:
        steps = find_steps(str(run))
        app = Viewer(str(run), steps, 0, 0, "advantage")
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            return await body(app, pilot)

    return asyncio.run(go())


def said(app: Viewer, id: str) -> str:
    content = app.query_one(f"#{id}", Static).content
    assert isinstance(content, Text)
    return content.plain


def lines(app: Viewer, id: str = "tokens") -> list[str]:
    """What is on the screen of a list or of the tokens."""
    view = app.query_one(f"#{id}", Listing | TokenView)
    return [view.render_line(y).text.rstrip() for y in range(view.size.height)]


async def answer(app: Viewer, pilot: Pilot, key: str, text: str) -> None:
    """Open the line by a key, fill it in, and send it."""
    await pilot.press(key)
    app.query_one(Input).value = text
    await pilot.press("enter")


def style_of(app: Viewer, text: str) -> Style:
    view = app.query_one(TokenView)
    [style] = [s.style for y in range(view.size.height) for s in view.render_line(y) if s.text == text and s.style]
    return style


def test_keys_move_through_episodes_and_steps(tmp_path: Path) -> None:
    async def body(app: Viewer, pilot: Pilot) -> None:
        assert said(app, "facts").startswith("step 1, group 0, episode 0: terminated, reward 1, 2 turns, 6 tokens")
        assert lines(app, "steps")[:4] == [
            "   step   reward",
            "      1    0.125",
            "      2    0.250",
            "     12    0.500",
        ]
        listed = [line.split() for line in lines(app, "episodes")[:5]]
        assert listed == [
            ["group", "episode", "reward", "ending", "turns", "rows", "tokens"],
            ["0", "0", "1", "end", "2", "1", "6"],
            ["0", "1", "0", "failed", "1", "1", "3"],
            ["1", "2", "-0.5", "end", "2", "2", "6"],
            ["1", "3", "0", "trunc", "1", "1", "2"],
        ]
        await pilot.press("j", "down")
        assert "episode 2: terminated" in said(app, "facts")
        await pilot.press("k", "n")
        assert said(app, "facts").startswith("step 2, group 0, episode 1: error (TimeoutError)")
        await pilot.press("up", "up", "n", "n", "p")
        assert said(app, "facts").startswith("step 2, group 0, episode 0")
        await pilot.press("g", "1", "2", "enter")
        assert said(app, "facts").startswith("step 12, ")
        await answer(app, pilot, "g", "7")
        assert said(app, "status") == "no step 7; there are 3, 1 to 12" and said(app, "facts").startswith("step 12, ")
        await pilot.press("g", "escape", "p")
        assert said(app, "facts").startswith("step 2, ")
        await pilot.click("#steps", offset=(3, 3))
        await pilot.click("#episodes", offset=(3, 4))
        assert said(app, "facts").startswith("step 12, group 1, episode 3: truncated")
        await pilot.click("#episodes", offset=(3, 0))
        await pilot.click("#episodes", offset=(3, 9))
        assert app.chosen == 3

    play(small_run(tmp_path / "run"), body)


def test_the_cursor_tells_a_tokens_numbers(tmp_path: Path) -> None:
    async def body(app: Viewer, pilot: Pilot) -> None:
        assert said(app, "token") == "token 1/6  id 100  'Q'  not the policy's\n"
        await pilot.press("right")
        assert said(app, "token") == (
            "token 2/6  id 101  'a'  turn 1\nlogp -0.5  advantage 1  ratio 0.609507  value 0.15 +- 0.05"
        )
        await pilot.press("right_square_bracket")
        assert said(app, "token").startswith("token 5/6  id 104  'c'  turn 2\n")
        await pilot.press("left_square_bracket", "h")
        assert said(app, "token").startswith("token 1/6")
        await pilot.press("end")
        assert "reward 1" in said(app, "token")
        await pilot.press("l", "home", "pagedown")
        assert said(app, "token").startswith("token 5/6")
        await pilot.press("pageup")
        assert said(app, "token").startswith("token 1/6")
        await pilot.click("#tokens", offset=(1, 3))
        assert said(app, "token").startswith("token 3/6  id 102  'b\u21b5'")
        assert style_of(app, "b\u21b5").reverse
        curve = app.query_one(ValueLine).render()
        value, deviation = curve.plain.split("\n")
        assert re.fullmatch("value {6}\u2581[\u2582-\u2587]{3}\u2588 0.15 .. 0.55", value)
        assert deviation.startswith("deviation ") and deviation.endswith("0.05 .. 0.05")
        assert (curve.spans[0].start, curve.spans[0].end) == (12, 13)

    play(small_run(tmp_path / "run", critics=2), body)


def test_colours_are_chosen_by_keys(tmp_path: Path) -> None:
    async def body(app: Viewer, pilot: Pilot) -> None:
        view = app.query_one(TokenView)
        seen = {}
        for key in "avrm":
            await pilot.press(key)
            seen[key] = [style_of(app, text).bgcolor for text in ("a", "b\u21b5", "OBS", "c", "d")]
            assert said(app, "legend").startswith(app.quantity)
        base = view.background_colors[1]
        plain = style_of(app, "OBS").bgcolor

        def expected(quantity: str, level: int):
            if level == 0:
                return plain
            rgb, alpha = colour(quantity, level)
            return base.blend(Color(*rgb), alpha).rich_color

        # Twice the root mean square of the step's advantages (1 -1 .5 .25 -.25) is 1.38; 1 is level 4 of 5.
        assert seen["a"] == [expected("advantage", x) for x in (4, -4, 0, 2, 0)]
        assert seen["m"] == [expected("mask", x) for x in (1, 1, 0, 1, 2)]
        assert seen["v"] == [expected("value", x) for x in (0, 1, 0, 4, 5)]
        assert len(set(seen["r"])) > 2 and seen["r"][2] == plain
        await pilot.press("d")
        assert not app.current_theme.dark and view.background_colors[1] != base
        assert style_of(app, "a").bgcolor != seen["m"][0]

    play(small_run(tmp_path / "run"), body)


def test_what_was_not_recorded(tmp_path: Path) -> None:
    async def body(app: Viewer, pilot: Pilot) -> None:
        await pilot.press("v", "right")
        assert said(app, "legend") == "value: no value was recorded: the run has no critic"
        assert said(app, "token").endswith("logp -0.5  advantage 1  ratio none  value none")
        await pilot.press("r")
        assert said(app, "legend").startswith("ratio: no ratio was recorded")
        assert app.query_one(ValueLine).render().plain == "no values: the run has no critic"

    play(small_run(tmp_path / "run", critics=0, ratio=False), body)


def test_filters_and_help(tmp_path: Path) -> None:
    async def body(app: Viewer, pilot: Pilot) -> None:
        await answer(app, pilot, "slash", "failed")
        assert "episode 1: error" in said(app, "facts") and len(app.listed) == 1
        assert said(app, "status") == "1 of 4 episodes: failed  (escape: all)"
        await pilot.press("n")
        assert said(app, "facts").startswith("step 2, group 0, episode 1") and len(app.listed) == 1
        await answer(app, pilot, "slash", "zz")
        assert said(app, "facts") == "nothing to show" and lines(app)[0] == "" and said(app, "token") == ""
        await pilot.press("j", "right", "end", "pagedown", "left_square_bracket", "v")
        await pilot.press("escape")
        assert len(app.listed) == 4 and said(app, "status").startswith("? keys")
        await pilot.press("slash", "q")  # a letter of the line now, no key
        await answer(app, pilot, "slash", "reward>q")
        assert said(app, "status") == "reward>q: q is no number" and len(app.listed) == 4
        await pilot.press("question_mark")
        assert len(app.screen_stack) == 2
        await pilot.press("j")
        assert len(app.screen_stack) == 1 and app.chosen == 0
        await pilot.press("q")
        assert not app.is_running or app._exit

    play(small_run(tmp_path / "run"), body)


def test_rows_of_a_chain_are_one_episode(tmp_path: Path) -> None:
    async def body(app: Viewer, pilot: Pilot) -> None:
        await pilot.press("j", "j")
        shown = lines(app)
        assert shown[1] == "Q" and shown[3] == "ssum"
        assert shown[4].startswith(
            "\u2550\u2550 row 1: the context was compacted, value 0.3 before it \u2550\u2550\u2550"
        )
        assert shown[5].startswith("\u2500\u2500 context, 1 tokens") and shown[6] == "sum" and shown[8] == "end."

    play(small_run(tmp_path / "run"), body)


def test_a_transcript_that_is_corrupt_is_a_line(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    (run / "rollouts/step_000002.jsonl").write_text("\x1b[red]\n")

    async def body(app: Viewer, pilot: Pilot) -> None:
        await pilot.press("n")
        assert "step_000002.jsonl:1: no JSON" in said(app, "status") and said(app, "facts") == "nothing to show"
        await pilot.press("n")
        assert said(app, "facts").startswith("step 12, ")
        (run / "rollouts/step_000012.jsonl").write_text("changed\n")
        await pilot.press("j")
        assert "step_000012.jsonl:2: no JSON" in said(app, "status")

    play(run, body)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    later = (run / "rollouts/step_000012.jsonl").rename(run / "later")

    async def body(app: Viewer, pilot: Pilot) -> None:
        await pilot.press("n", "n")
        assert said(app, "facts").startswith("step 2, ")
        later.rename(run / "rollouts/step_000012.jsonl")
        app.action_step(1)
        assert said(app, "facts").startswith("step 12, ") and "12" in lines(app, "steps")[3]
        (run / "metrics.jsonl").write_text("3\n")
        app.action_step(1)
        assert "metrics.jsonl: is no list of metrics" in said(app, "status")
        assert said(app, "facts").startswith("step 12, ")

    play(run, body)


def test_nothing_of_the_model_is_obeyed(tmp_path: Path) -> None:
    n = len(HOSTILE)
    r = row(HOSTILE, "0" + "1" * (n - 1), ending=Ending.ERROR, info={"error": "[red]\x1b[31m"})
    write_step(tmp_path, 1, [r], [HOSTILE], advantage_BT=np.ones((1, n), np.float32))

    async def body(app: Viewer, pilot: Pilot) -> None:
        shown = "".join(lines(app))
        for text in (r"\x1b[2J\x1b]0;title\x07", "[red]x[/red][link=http://a]", r"\u202egnp.exe", r"\x00\x9b31m\ud800"):
            assert text in shown
        assert r"error ([red]\x1b[31m)" in said(app, "facts")
        for _ in range(n):
            assert said(app, "token").replace("\n", "").isprintable()
            app.action_token(1)
        await answer(app, pilot, "slash", "[red")
        assert said(app, "status").startswith("1 of 1 episodes: [red")
        picture = app.export_screenshot()
        assert all(c.isprintable() or c == "\n" for c in picture) and "[red]x[/red]" in picture

    play(tmp_path, body)


def test_ten_thousand_tokens_open_at_once(tmp_path: Path) -> None:
    n = 10_000
    texts = ["\n" if i % 50 == 0 else f"word{i % 97} " for i in range(n)]
    r = row(texts, "".join("01"[(i // 200) % 2] for i in range(n)))
    x = np.random.default_rng(0).normal(size=(1, n)).astype(np.float32)
    write_step(tmp_path, 1, [r], [texts], advantage_BT=x, value_MBT=x[None], ratio_BT=np.exp(x))

    async def body(app: Viewer, pilot: Pilot) -> None:
        assert time.process_time() - start < 2.0  # some 0.3 s without the type checks of the tests
        await pilot.press("end")
        assert said(app, "token").startswith("token 10000/10000")
        assert any("word" in line for line in lines(app))

    start = time.process_time()
    play(tmp_path, body)


def test_a_narrow_terminal(tmp_path: Path) -> None:
    async def body(app: Viewer, pilot: Pilot) -> None:
        assert app.query_one(TokenView).size.width == 60 and app.query_one("#lists").size.height < 10
        assert "turn 1, 2 tokens" in lines(app)[2]

    play(small_run(tmp_path / "run"), body, size=(60, 24))


@pytest.mark.parametrize("width", [8, 9, 30])
def test_lines_hold_every_character_in_order(width: int, tmp_path: Path) -> None:
    texts = [*HOSTILE, "\u4f60\u597d" * 9, "a\n\nb", "", "\u0301", "x" * 25, "\U0001f600"]
    r = row(texts, "01" * (len(texts) // 2))
    write_step(tmp_path, 1, [r], [texts])
    file = StepFile(find_steps(str(tmp_path))[0])
    episode = file.episode(file.episodes[0])
    found, line_of = arrange(episode, width)
    assert max(sum(cell_len(text) for _, text in line) for line in found) <= width
    joined = dict.fromkeys(range(len(episode.tokens)), "")
    for y, line in enumerate(found):
        for i, text in line:
            if i >= 0:
                assert joined[i] or line_of[i] == y
                joined[i] += text
    assert list(joined.values()) == [visible(t.text, t.id).replace("\n", "") for t in episode.tokens]
    assert line_of == sorted(line_of)
