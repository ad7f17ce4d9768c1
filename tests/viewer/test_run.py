"""A run directory read back: what is there, and one clear line for what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ppojax.errors import DataError
from ppojax.viewer.run import StepFile, find_steps
from viewer_run import small_run, write_metrics


def test_steps_in_their_order_with_their_rewards(tmp_path: Path) -> None:
    steps = find_steps(str(small_run(tmp_path / "run")))
    assert [(entry.step, entry.reward) for entry in steps] == [(1, 0.125), (2, 0.25), (12, 0.5)]
    (tmp_path / "run/metrics.jsonl").unlink()
    assert [entry.reward for entry in find_steps(str(tmp_path / "run"))] == [None] * 3


def test_rows_of_an_episode_are_one_episode(tmp_path: Path) -> None:
    file = StepFile(find_steps(str(small_run(tmp_path / "run", critics=2)))[2])
    found = [(e.group, e.number, e.ending, e.error, e.reward, e.turns, len(e.places), e.tokens) for e in file.episodes]
    assert found == [
        (0, 0, "terminated", None, 1.0, 2, 1, 6),
        (0, 1, "error", "TimeoutError", 0.0, 1, 1, 3),
        (1, 2, "terminated", None, -0.5, 2, 2, 6),
        (1, 3, "truncated", None, 0.0, 1, 1, 2),
    ]
    assert file.episodes[2].text == "Qssumsumend."
    chain = file.episode(file.find(2))
    assert [token.text for token in chain.tokens] == ["Q", "s", "sum", "sum", "end", "."]
    assert [(b.start, b.end, b.action, b.turn, b.segment, b.first) for b in chain.blocks()] == [
        (0, 1, False, 0, 0, True),
        (1, 3, True, 1, 0, False),
        (3, 4, False, 1, 1, True),
        (4, 6, True, 2, 1, False),
    ]
    assert chain.step == 12 and chain.critics == 2
    assert [token.held for token in chain.tokens] == [False, False, True, False, False, False]
    assert chain.ends == pytest.approx((0.35, None)) and file.episode(file.find(3)).ends == pytest.approx((0.25,))


def test_what_is_known_of_a_token(tmp_path: Path) -> None:
    file = StepFile(find_steps(str(small_run(tmp_path / "run", critics=2)))[0])
    prompt, first, second, observation, third, last = file.episode(file.find(0)).tokens
    assert prompt[4:] == (0, 0, 0.0, None, None, None, False, None, None)
    assert (first.action, first.logp, first.advantage, first.turn) == (True, -0.5, 1.0, 1)
    assert first.ratio == pytest.approx(2 ** (-1 + 2 / 7), abs=1e-6)  # six digits are stored
    assert (first.value, first.spread) == pytest.approx((0.15, 0.05), abs=1e-6)
    assert second.text == "b\n" and observation.logp is None and observation.value == pytest.approx(0.35)
    assert (observation.turn, third.turn, last.reward) == (1, 2, 1.0)
    assert not any(token.trained for token in file.episode(file.find(1)).tokens)


def test_rows_need_not_be_in_order_and_old_files_do(tmp_path: Path) -> None:
    [entry, *_] = find_steps(str(small_run(tmp_path / "run")))
    rows = [json.loads(line) for line in entry.path.read_text().splitlines()]
    for r in rows:
        for new in ("error", "clipped", "value_end", "mask"):
            del r[new]
    entry.path.write_text("".join(json.dumps(r) + "\n" for r in reversed(rows)))
    file = StepFile(entry)
    assert [e.number for e in file.episodes] == [3, 2, 1, 0]
    assert "".join(token.text for token in file.episode(file.find(2)).tokens) == "Qssumsumend."
    assert file.find(2).ending == "terminated" and file.episode(file.find(2)).ends == (None, None)


def test_a_run_without_critic_and_ratio(tmp_path: Path) -> None:
    file = StepFile(find_steps(str(small_run(tmp_path / "run", critics=0, ratio=False)))[0])
    tokens = file.episode(file.find(0)).tokens
    assert {(token.value, token.spread, token.ratio) for token in tokens} == {(None, None, None)}
    assert (file.scale.low, file.scale.high) == (0, 1)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run=.*none: there is no such folder; give the folder of a run"):
        find_steps(f"{tmp_path}/none")
    for _ in range(2):
        with pytest.raises(DataError, match=r"there is no transcript in .*rollouts, expected step_000001.jsonl"):
            find_steps(str(tmp_path))
        (tmp_path / "rollouts").mkdir(exist_ok=True)
    (tmp_path / "rollouts/.step_000001.jsonl.tmp").write_text("half")
    with pytest.raises(DataError, match="there is no transcript"):
        find_steps(str(tmp_path))


@pytest.mark.parametrize("line", ["nonsense", "3", '{"time": 0}', "[" * 100_000])
def test_metrics_that_are_none(line: str, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl: is no list of metrics, expected one object a line"):
        find_steps(str(run))


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    write_metrics(run, {1: 0.75})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert [entry.reward for entry in find_steps(str(run))] == [0.75, None, None]


def change(**fields: object) -> Callable[[dict], str]:
    return lambda row: json.dumps({**row, **fields})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda row: "", "no JSON"),
        (lambda row: json.dumps(row)[:200], "no JSON"),
        (lambda row: "[" * 100_000, "no JSON"),
        (lambda row: "[]", "valid dictionary or instance"),
        (lambda row: "\x00\x01", "no JSON"),
        (change(text=["Q"]), "text has 1 entries for 3 tokens"),
        (change(value=[[0.0]]), "value.0 has 1 entries for 3 tokens"),
        (change(value_end=[0.0, 1.0, 2.0]), "value_end has 3 entries for 1 critics"),
        (change(advantage=[0, 0, "1"]), "advantage.2: Input should be a valid number"),
        (change(advantage=[0, 0, float("nan")]), "advantage.2: Input should be a finite number"),
        (change(advantage=[0, 0, 1e39]), "advantage.2: Input should be less than or equal to 35"),
        (change(advantage=[0, 0, 10**400]), "advantage.2: "),
        (change(action=[0, 1, 7]), "action.2: Input should be 0 or 1"),
        (change(ending="[red]"), "ending: Input should be 'terminated', 'truncated', 'cut' or 'error'"),
        (change(token=None), "token: Input should be a valid list"),
        (change(group="0"), "group: Input should be a valid integer"),
        (change(episode=0, segment=0), "episode 0, segment 0, group 0 contradicts line 1"),
        (
            change(episode=2, segment=7),
            "episode 2, segment 0, group 1 contradicts line 2: expected another segment of group 0",
        ),
    ],
)
def test_a_corrupt_row_is_named(spoil: Callable[[dict], str], said: str, tmp_path: Path) -> None:
    [entry, *_] = find_steps(str(small_run(tmp_path / "run")))
    lines = entry.path.read_text().splitlines()
    lines[1] = spoil(json.loads(lines[1]))
    entry.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"step_000001.jsonl:\d: .*; ") as error:
        StepFile(entry)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file(tmp_path: Path) -> None:
    [entry, *_] = find_steps(str(small_run(tmp_path / "run")))
    entry.path.write_text("")
    with pytest.raises(DataError, match=r"step_000001.jsonl: is empty, expected a row for each episode"):
        StepFile(entry)
