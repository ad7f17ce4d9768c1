"""Episodes: tokens in, tokens out, rewards where they were earned, and how each row ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest

from ppojax.advantages import Group
from ppojax.envs import Reset, Task
from ppojax.errors import DataError
from ppojax.experience.pack import pack
from ppojax.experience.summary import rollout_metrics
from ppojax.models.forward import Params
from ppojax.rollout import collect
from ppojax.rollout.collect import Collector
from ppojax.rollout.decode import Turns
from ppojax.rollout.episode import Episode
from ppojax.rollout.sampler import Slots
from ppojax.types import Ending, Recorded, Records, Rollout, Row
from tiny_model import TOKENIZER, Scripted, ScriptedEnv, bits, collector_of, random_policy, scripted_task, speaker

KEY = jax.random.key(0)
TASKS = [
    scripted_task("1?", ("23 <", 0.25), ("0", -0.125), ("done", 1 / 3)),
    scripted_task("45 6?", ("", 0.5), ("done", 0.1)),
    scripted_task("7?", ("cut", 0.7)),
]


class Said(NamedTuple):
    """A turn as the sampler gave it."""

    token: list[int]
    logp: list[float]
    recorded: Recorded


def collected(collector: Collector, policy: Params, tasks: Sequence[Task]) -> tuple[Rollout, dict[int, list[Said]]]:
    """Play, and keep what the sampler gave, turn by turn of each episode."""
    said: dict[int, list[Said]] = defaultdict(list)
    open_turns: set[int] = set()

    def recording(params: Params, slots: Slots, turns: Turns, *args: object, **settings: object) -> object:
        slots, segment = decode(params, slots, turns, *args, **settings)
        got = jax.device_get(segment)
        for b in np.flatnonzero(turns.live_B):
            e, n = int(turns.episode_B[b]), int(got.count_B[b])
            piece = Said(
                got.token_BN[b, :n].tolist(),
                got.logp_BN[b, :n].tolist(),
                jax.tree.map(lambda x, b=b, n=n: x[b, :n], got.recorded),
            )
            if e in open_turns:
                last = said[e].pop()
                joined = jax.tree.map(lambda x, y: np.concatenate([x, y]), last.recorded, piece.recorded)
                piece = Said(last.token + piece.token, last.logp + piece.logp, joined)
            said[e].append(piece)
            (open_turns.add if got.live_B[b] else open_turns.discard)(e)
        return slots, segment

    decode = collect.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "decode", recording)
        return collector(policy, tasks, KEY), said


def test_tokens_in_tokens_out() -> None:
    """A row is its prompt, then sampled tokens exactly as they were sampled and the template's suffixes."""
    collector = collector_of(group_size=2, segment=4)
    rollout, turns = collected(collector, random_policy(), TASKS)
    respelled = 0
    for b, row in enumerate(rollout.rows):
        task = TASKS[b // 2]
        token = TOKENIZER.render([{"role": "user", "content": task.data["prompt"]}])
        mask, logp, reward = ([0] * len(token) for _ in range(3))
        script = task.data["turns"]
        for n, (observation, earned) in enumerate(script):
            ids = turns[b][n].token
            count = len(ids)
            respelled += TOKENIZER.encode(TOKENIZER.decode(ids)) != ids
            token += ids
            mask += [1] * count
            logp += turns[b][n].logp
            reward += [0] * (count - 1) + [earned]
            if n + 1 < len(script):
                suffix = TOKENIZER.suffix(
                    [{"role": "tool", "content": observation}], ended=ids[-1] in TOKENIZER.eos_ids
                )
                token += suffix
                for x in (mask, logp, reward):
                    x += [0] * len(suffix)
        assert row.token.tolist() == token
        assert row.action.tolist() == [bool(m) for m in mask]
        np.testing.assert_array_equal(bits(row.logp_behavior), bits(logp))
        np.testing.assert_array_equal(bits(row.reward), bits(reward))
        assert (row.group, row.episode, row.segment) == (b // 2, b, 0)
    assert respelled  # some turns hold tokens that their text would not give back


def test_what_is_said_is_what_the_environment_hears() -> None:
    """The text of a turn is without its eos, and with the string that stopped it."""
    rollout, _ = collected(collector_of(group_size=1), speaker("abc"), TASKS[:2])
    assert [m["content"] for m in rollout.rows[0].messages] == ["1?", "abc", "23 <", "abc", "0", "abc"]
    assert TOKENIZER.decode(rollout.rows[1].token.tolist()) == "45 6?abcabc"
    # Ended by eos, so the rows are the conversation as the template writes it.
    for row in rollout.rows:
        assert row.token.tolist() == TOKENIZER.render(row.messages, add_generation_prompt=False)
    stopped, _ = collected(collector_of(group_size=1, stop=("bc",)), speaker("abcd"), TASKS[1:2])
    row = stopped.rows[0]
    assert [m["content"] for m in row.messages] == ["45 6?", "abc", "", "abc"]
    # A turn that a string stopped is closed by the template, not by an action.
    assert row.token.tolist() == TOKENIZER.render(row.messages, add_generation_prompt=False)[:-1]
    assert row.action.sum() == 6 and not row.action[row.token == TOKENIZER.eos_ids[0]].any()


def test_rewards_are_not_rounded() -> None:
    """Fractions that 16 bits would lose arrive as the float32 nearest to them, on the last token of their turn."""
    task = scripted_task("1?", ("a", 0.1), ("a", 1e-4), ("a", 1000.0625))
    row = collected(collector_of(group_size=1), speaker("ab"), [task])[0].rows[0]
    last = np.flatnonzero(row.reward)
    np.testing.assert_array_equal(bits(row.reward[last]), bits([0.1, 1e-4, 1000.0625]))
    assert row.action[last].all() and (row.token[last] == TOKENIZER.eos_ids[0]).all()


def test_how_rows_end() -> None:
    rows = collected(collector_of(group_size=1), speaker("ab"), TASKS)[0].rows
    assert [row.ending for row in rows] == [Ending.TERMINATED, Ending.TERMINATED, Ending.TRUNCATED]
    assert [row.info["turns"] for row in rows] == [3, 2, 1]


@pytest.mark.parametrize(
    ("positions", "length", "ending", "reward"),
    [(64, 19, Ending.TERMINATED, 0.75), (17, 17, Ending.TERMINATED, 0.75), (16, 8, Ending.TRUNCATED, 0.5)],
)
def test_no_room_for_a_turn_truncates(positions: int, length: int, ending: Ending, reward: float) -> None:
    """Prompt 5, turn 3, observation 8: 17 positions leave one for the next turn, 16 leave none.

    What cannot be answered is not written, and what was earned before is kept.
    """
    task = scripted_task("11", ("abcde", 0.5), ("done", 0.25))
    row = collected(collector_of(group_size=1, positions=positions), speaker("ab"), [task])[0].rows[0]
    assert (len(row.token), row.ending, row.reward.sum()) == (length, ending, reward)
    assert row.action[-1]


def test_a_prompt_without_room_is_refused() -> None:
    collector = collector_of(positions=12)
    with pytest.raises(DataError) as caught:
        collector(random_policy(), [scripted_task("0123456789", ("done", 1.0))], KEY)
    assert str(caught.value) == (
        "task 0123456789: its prompt has 13 tokens, rollout.max_tokens leaves room for 11: "
        "raise rollout.max_tokens, shorten the task, or set rollout.long_prompts=drop or truncate"
    )
    collector_of(positions=14)(random_policy(), [scripted_task("0123456789", ("done", 1.0))], KEY)


def failing_rows() -> Rollout:
    """Two groups of two and one of two that fails, in its second turn and in its first."""
    tasks = [
        TASKS[1],
        scripted_task("2?", ("a", 0.5), ("done", ValueError("no"))),
        scripted_task("3?", ("", OSError())),
    ]
    return collected(collector_of(group_size=2), random_policy(), tasks)[0]


def test_an_environment_that_fails_ends_its_own_episode_only() -> None:
    rollout = failing_rows()
    assert [row.ending for row in rollout.rows] == [Ending.TERMINATED] * 2 + [Ending.ERROR] * 4
    assert {name: v for name, v in rollout.metrics.items() if name.startswith("error/")} == {
        "error/ValueError": 2.0,
        "error/OSError": 2.0,
    }
    metrics = rollout_metrics(rollout.rows)
    assert metrics["error/frac"] == pytest.approx(4 / 6)
    assert metrics["reward/mean"] == pytest.approx(0.6) and metrics["reward/std"] == pytest.approx(0)


def test_failed_rows_are_out_of_the_loss_and_the_statistics() -> None:
    rows = list(failing_rows().rows)
    good = [scale(row, k) for k, row in enumerate(rows[:2])]
    # A failed row in the group of the good ones, with a reward that would move their mean.
    stray = rows[2]
    assert stray.reward.sum() == 0.5
    rows = [*good, Row(**{**vars(stray), "group": 0})]
    mesh = collector_of().sampler.mesh
    mixed, alone = (jax.device_get(pack(r, batch=3, bucket=8, actions=18, mesh=mesh)) for r in (rows, good))
    assert mixed.valid_B.tolist() == [True, True, False]
    assert not mixed.action_BT[2].any() and not mixed.action_index_BA[2].any() and not mixed.logp_behavior_BT[2].any()
    got, want = (np.asarray(jax.jit(Group(scale="none"))(e).advantage_BT) for e in (mixed, alone))
    np.testing.assert_array_equal(got[:2, : want.shape[1]], want[:2])
    assert not np.asarray(got[2]).any() and np.asarray(want[:2]).any()


def scale(row: Row, k: int) -> Row:
    return Row(**{**vars(row), "reward": row.reward * np.float32(1 + k)})


def test_records_stand_at_their_actions() -> None:
    """Over turns of several lengths; a row that failed leaves nothing in the arrays, one that never began has none."""
    tasks = [TASKS[0], scripted_task("2?", ("a", 0.5), ("done", ValueError("no")))]
    collector = collector_of(group_size=1, records=Records(3, hidden=True))
    rollout, turns = collected(collector, random_policy(), tasks)
    rows = rollout.rows
    for b, row in enumerate(rows):
        played = turns[b]
        assert len(played) > 1
        for kept, name in zip(row.recorded, ("top_id", "top_logp", "hidden"), strict=True):
            want = np.concatenate([getattr(turn.recorded, name) for turn in played])
            np.testing.assert_array_equal(kept, want)
        assert row.recorded.hidden.shape == (row.action.sum(), 32)
    packed = pack(rows, batch=3, bucket=8, actions=20, mesh=collector.sampler.mesh)
    m = int(rows[0].action.sum())
    for kept_BA, kept in zip(packed.recorded, rows[0].recorded, strict=True):
        np.testing.assert_array_equal(kept_BA[0, :m], kept)
        assert (
            kept_BA.dtype == kept.dtype and not np.asarray(kept_BA[0, m:]).any() and not np.asarray(kept_BA[1:]).any()
        )
    dead = Task("dead", {})
    failed = collector(random_policy(), [dead], KEY).rows
    assert [x.shape for x in failed[0].recorded] == [(0, 3), (0, 3), (0, 32)]
    assert pack(failed, batch=1, bucket=8, actions=4, mesh=collector.sampler.mesh).recorded.hidden.shape == (1, 4, 32)


def test_every_environment_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, made = collector_of(), []
    make = type(collector.env).make
    monkeypatch.setattr(type(collector.env), "make", lambda self: made.append(make(self)) or made[-1])
    collector(random_policy(), TASKS, KEY)
    assert len(made) == 6 and all(env.closed for env in made)


def test_a_close_that_fails_changes_nothing() -> None:
    class Stuck(ScriptedEnv):
        def close(self) -> None:
            raise OSError

    episode = Episode(Stuck(), 0, 0, [], [], ending=Ending.TERMINATED)
    episode.close()
    assert episode.rows()[0].ending == Ending.TERMINATED


def test_the_same_key_plays_the_same_episodes() -> None:
    collector = collector_of()
    a, b = (collector(random_policy(), TASKS, KEY).rows for _ in range(2))
    other = collector(random_policy(), TASKS, jax.random.key(1)).rows
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.token, y.token)
        np.testing.assert_array_equal(bits(x.logp_behavior), bits(y.logp_behavior))
    assert any(not np.array_equal(x.token, y.token) for x, y in zip(a, other, strict=True))


class Odd(ScriptedEnv):
    """Starts as its task says: it raises, or adds its own number to the prompt."""

    made = 0

    def reset(self, task: Task) -> Reset:
        Odd.made += 1
        if task.data["prompt"] == "dead" or (task.data["prompt"] == "fade" and Odd.made % 2):
            raise OSError
        if task.data["prompt"] == "tell":
            return Reset([{"role": "user", "content": "1"}], privileged=str(Odd.made))
        if task.data["prompt"] == "vary":
            return Reset([{"role": "user", "content": str(Odd.made)}])
        return super().reset(task)


def odd_collector(monkeypatch: pytest.MonkeyPatch) -> Collector:
    monkeypatch.setattr(Scripted, "make", lambda self: Odd())
    Odd.made = 0
    return collector_of(group_size=2)


def test_a_reset_that_fails_ends_its_own_episode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed row keeps the group's prompt, and whole groups may fail."""
    collector = odd_collector(monkeypatch)
    failing = Task("fail", {"prompt": "fade", "turns": (("done", 1.0),)})
    rows = collector(random_policy(), [failing, TASKS[2]], KEY).rows
    assert [row.ending for row in rows] == [Ending.ERROR, Ending.TERMINATED, Ending.TRUNCATED, Ending.TRUNCATED]
    assert rows[0].info["error"] == "OSError" and not rows[0].action.any()
    np.testing.assert_array_equal(rows[0].token, rows[1].token[: len(rows[0].token)])
    both = Task("both", {"prompt": "dead", "turns": (("done", 1.0),)})
    rows = collector(random_policy(), [both, TASKS[2]], KEY).rows
    assert [row.ending for row in rows] == [Ending.ERROR] * 2 + [Ending.TRUNCATED] * 2


def test_failed_episodes_have_the_hint_of_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a group share their prompt, and the critics' hint before it; so hints have to agree, too."""
    collector = replace(odd_collector(monkeypatch), hint_tokens=4)
    reset = Odd.reset
    monkeypatch.setattr(Odd, "reset", lambda self, task: replace(reset(self, task), privileged="12"))
    failing = Task("fail", {"prompt": "fade", "turns": (("done", 1.0),)})
    rows = collector(random_policy(), [failing], KEY).rows
    assert [row.ending for row in rows] == [Ending.ERROR, Ending.TERMINATED]
    assert all(row.hint is not None and row.hint.tolist() == TOKENIZER.encode("12") for row in rows)
    monkeypatch.setattr(Odd, "reset", reset)
    with pytest.raises(DataError, match="starts the episodes of a group differently"):
        collector(random_policy(), [Task("tell", {"prompt": "tell", "turns": (("done", 1.0),)})], KEY)


def test_prompts_of_a_group_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("vary", {"prompt": "vary", "turns": (("done", 1.0),)})
    with pytest.raises(DataError, match=r"task vary: its environment starts the episodes of a group differently: make"):
        odd_collector(monkeypatch)(random_policy(), [task], KEY)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), None])
def test_a_reward_that_is_no_number_ends_its_episode_as_an_error(reward: float) -> None:
    rows = collector_of(group_size=1)(random_policy(), [scripted_task("1?", ("done", reward))], KEY).rows
    assert rows[0].ending == Ending.ERROR and not rows[0].reward.any()


def test_an_observation_that_cannot_be_written_ends_its_episode_as_an_error() -> None:
    rows = collector_of(group_size=1)(random_policy(), [scripted_task("1?", ("\u2603", 0.5), ("done", 1.0))], KEY).rows
    assert rows[0].ending == Ending.ERROR and rows[0].info["error"] == "DataError"
