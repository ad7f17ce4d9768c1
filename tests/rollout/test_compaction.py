"""Compaction: an episode goes on in another row, of tokens exactly as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest

from ppojax.envs import Reset, Task
from ppojax.errors import ConfigError, DataError
from ppojax.experience.pack import lay_out, pack
from ppojax.models.forward import Params, score_tokens
from ppojax.rollout.collect import Collector
from ppojax.rollout.compaction import Compactor
from ppojax.rollout.settings import Summarize, Truncate
from ppojax.types import Ending, Experience, Layout, Records, Row
from tiny_model import MODEL, TOKENIZER, bits, collector_of, random_policy, scripted_task, speaker

KEY = jax.random.key(0)
TASK = scripted_task("12?", *((f"{n}abc", n / 8) for n in range(8)))
OTHER = scripted_task("4?", ("0", 0.0), ("done", 0.5))
SUMMARY = {"keep_turns": 1, "max_tokens": 5, "request": "0?", "header": " < "}


def compacting(settings: Truncate | Summarize, positions: int = 40, **changes: Any) -> Collector:
    collector = collector_of(positions=positions, **changes)
    sampler = collector.sampler
    return replace(collector, compactor=Compactor(settings, TOKENIZER, sampler.positions, sampler.turn_tokens))


def summarizing(**changes: Any) -> Summarize:
    return Summarize.model_validate({**SUMMARY, **changes})


def episodes(rows: Sequence[Row]) -> list[list[Row]]:
    numbers = sorted({row.episode for row in rows})
    return [[row for row in rows if row.episode == number] for number in numbers]


def said(row: Row) -> list[int]:
    return row.token[row.action].tolist()


def prompt_of(task: Task, summary: str | None = None) -> list[int]:
    text = task.data["prompt"] if summary is None else f"{task.data['prompt']} < {summary}"
    return TOKENIZER.render([{"role": "user", "content": text}])


def test_old_turns_are_left_out() -> None:
    """Row k + 1 is the prompt, the last turns of row k with the answers to them, and then what is new."""
    rows = compacting(Truncate(keep_turns=1, most=10), group_size=1)(random_policy(), [TASK, OTHER], KEY).rows
    chain, short = episodes(rows)
    assert len(short) == 1 and short[0].ending == Ending.TERMINATED
    assert [row.segment for row in chain] == list(range(len(chain))) and len(chain) > 2
    assert [row.ending for row in chain] == [Ending.CUT] * (len(chain) - 1) + [Ending.TERMINATED]
    prompt = prompt_of(TASK)
    for before, after in pairwise(chain):
        assert before.action[-1]  # what was answered last is read in the next row
        last = len(before.action) - int(np.argmin(before.action[::-1])) if not before.action.all() else 0
        kept = before.token[last:].tolist()
        first = int(after.action.argmax())
        assert after.token[: len(prompt)].tolist() == prompt
        assert after.token[len(prompt) : len(prompt) + len(kept)].tolist() == kept
        answer = next(m for m in after.messages if m["role"] == "tool")
        ended = kept[-1] in TOKENIZER.eos_ids
        assert after.token[len(prompt) + len(kept) : first].tolist() == TOKENIZER.suffix([answer], ended=ended)
        assert not after.action[:first].any() and not after.logp_behavior[:first].any() and len(after.token) <= 40
    # Every turn was heard once, and paid where it was said.
    assert sum(float(row.reward.sum()) for row in chain) == sum(n / 8 for n in range(8))
    assert [m["role"] for m in chain[-1].messages[:3]] == ["user", "assistant", "tool"]
    assert chain[0].info["turns"] == 8


def test_the_policy_writes_the_summary() -> None:
    """Row k ends with the request and a summary of actions; row k + 1 begins with the prompt that has the summary."""
    rows = compacting(summarizing(most=10), positions=52, group_size=1)(speaker("ab"), [TASK], KEY).rows
    assert len(rows) > 2 and [row.ending for row in rows[:-1]] == [Ending.CUT] * (len(rows) - 1)
    request = TOKENIZER.suffix([{"role": "user", "content": "0?"}], ended=True)
    for before, after in pairwise(rows):
        summary = before.token[-3:].tolist()
        assert before.action[-3:].all() and TOKENIZER.decode(summary[:2]) == "ab"
        assert before.token[-3 - len(request) : -3].tolist() == request
        assert before.messages[-2]["content"] == "0?" and before.messages[-1]["content"] == "ab"
        # The newest turn is in both rows, an action in the first only.
        tail = [m["content"] for m in after.messages[1:3]]
        want = TOKENIZER.render([{"role": "user", "content": "12? < ab"}, *after.messages[1:3]])
        assert tail[0] == "ab" and after.token[: len(want)].tolist() == want
        assert not after.action[: len(want)].any() and after.action[len(want)]
        assert not before.reward[-3:].any()
    assert sum(float(row.reward.sum()) for row in rows) == sum(n / 8 for n in range(8))


def test_without_kept_turns_only_the_summary_stays() -> None:
    rows = compacting(summarizing(keep_turns=0, most=1, limit=20), positions=64, group_size=1)(
        speaker("ab"), [TASK], KEY
    ).rows
    prompt = prompt_of(TASK, "ab")
    assert len(rows) == 2 and rows[1].token[: len(prompt)].tolist() == prompt and rows[1].action[len(prompt)]


def test_what_fits_is_not_touched() -> None:
    tasks = [OTHER, scripted_task("7?", ("cut", 0.7))]
    plain = collector_of()(random_policy(), tasks, KEY).rows
    same = compacting(Truncate(), positions=64)(random_policy(), tasks, KEY).rows
    for a, b in zip(plain, same, strict=True):
        np.testing.assert_array_equal(a.token, b.token)
        np.testing.assert_array_equal(bits(a.logp_behavior), bits(b.logp_behavior))


@pytest.mark.parametrize("settings", [Truncate(keep_turns=1), summarizing()])
def test_chains_do_not_depend_on_slots(settings: Truncate | Summarize) -> None:
    """The same rows in 2 slots as in 6, though other rows stand beside them; segments are drawn from anew."""
    few, many = (
        compacting(settings, positions=52, slots=slots)(random_policy(), [TASK, OTHER], KEY).rows for slots in (2, 6)
    )
    assert len(few) == len(many) > 4
    for a, b in zip(few, many, strict=True):
        assert (a.episode, a.segment, a.ending) == (b.episode, b.segment, b.ending)
        np.testing.assert_array_equal(a.token, b.token)
        np.testing.assert_allclose(a.logp_behavior, b.logp_behavior, rtol=1e-5, atol=1e-5)
    chain = episodes(many)[0]
    assert said(chain[0])[:6] != said(chain[1])[:6]


def test_what_was_recorded_is_of_the_row() -> None:
    """Log-probabilities are of a full forward over each row; hidden states and top tokens stand at its actions."""
    collector = compacting(summarizing(), positions=52, group_size=1, records=Records(2, hidden=True))
    rows = collector(random_policy(), [TASK, OTHER], KEY).rows
    assert len(rows) > 3
    experience = pack(rows, batch=len(rows), bucket=8, actions=52, mesh=collector.sampler.mesh)
    score = jax.jit(score_tokens, static_argnames=("model", "temperature"))
    trainer_BT = score(MODEL, random_policy(), experience, temperature=1.0).logp
    assert float(abs(np.asarray(trainer_BT) - np.asarray(experience.logp_behavior_BT)).max()) < 1e-5
    for row in rows:
        assert [len(kept) for kept in row.recorded] == [row.action.sum()] * 3


def test_limits() -> None:
    """After `most` cuts an episode is truncated as ever, and so is one of which nothing can be left out."""
    rows = compacting(Truncate(keep_turns=1, most=2), group_size=1)(random_policy(), [TASK], KEY).rows
    assert [row.ending for row in rows] == [Ending.CUT] * 2 + [Ending.TRUNCATED]
    long = scripted_task("1?", ("a" * 60, 0.5), ("done", 1.0))
    for settings in (Truncate(), summarizing()):
        rows = compacting(settings, positions=52, group_size=1)(random_policy(), [long], KEY).rows
        assert rows[-1].ending == Ending.TRUNCATED and sum(float(row.reward.sum()) for row in rows) == 0.5


def test_an_episode_may_write_so_many_tokens() -> None:
    """Over all of its rows: the last turn is cut to what is left, and then the episode is truncated."""
    collector = replace(compacting(Truncate(keep_turns=1, most=9), group_size=1), episode_tokens=18)
    whole, part = (c(speaker("abc"), [TASK], KEY).rows for c in (replace(collector, episode_tokens=None), collector))
    assert sum(int(row.action.sum()) for row in whole) == 32 and len(whole) > 1
    assert sum(int(row.action.sum()) for row in part) == 18 and len(part) > 1
    assert part[-1].ending == Ending.TRUNCATED and part[-1].clipped
    np.testing.assert_array_equal(part[0].token, whole[0].token)


def test_a_summary_that_writes_the_last_tokens_ends_its_episode() -> None:
    """Nothing is left for a turn behind it."""
    collector = compacting(summarizing(), positions=52, group_size=1)
    row = collector(random_policy(), [TASK], KEY).rows[0]
    assert row.ending == Ending.CUT
    written = int(row.action.sum())
    rows = replace(collector, episode_tokens=written)(random_policy(), [TASK], KEY).rows
    assert [r.ending for r in rows] == [Ending.TRUNCATED] and int(rows[0].action.sum()) == written


def test_a_row_without_room_for_a_turn_and_a_summary_is_a_last_one() -> None:
    """Its turns have their full length, as without compaction."""
    plain = collector_of(group_size=1, positions=52)(random_policy(), [TASK], KEY).rows
    for tokens in (30, 38):  # room for a turn and a summary, but not for an answer too; not even for these
        settings = summarizing(max_tokens=tokens, keep_turns=0)
        rows = compacting(settings, positions=52, group_size=1)(random_policy(), [TASK], KEY).rows
        assert len(rows) == 1 and rows[0].ending == Ending.TRUNCATED
        np.testing.assert_array_equal(rows[0].token, plain[0].token)


def test_an_answer_without_room_is_read_in_the_next_row() -> None:
    """It is in no row twice: the first asks for a summary without it."""
    task = scripted_task("1?", ("0", 0.0), ("b" * 30, 0.5), ("done", 1.0))
    rows = compacting(summarizing(), positions=52, group_size=1)(speaker("a"), [task], KEY).rows
    assert [row.ending for row in rows] == [Ending.CUT, Ending.TERMINATED]
    assert [m["content"] for m in rows[0].messages] == ["1?", "a", "0", "a", "0?", "a"]
    assert [m["content"] for m in rows[1].messages] == ["1? < a", "a", "b" * 30, "a"]
    long = TOKENIZER.encode("b" * 30)
    assert ["".join(map(chr, row.token.tolist())).count("".join(map(chr, long))) for row in rows] == [0, 1]


def test_a_failure_takes_the_whole_chain_out() -> None:
    turns = [*((f"{n}abc", n / 8) for n in range(5)), ("x", ValueError("no"))]
    rows = compacting(Truncate(keep_turns=1, most=9), group_size=1)(
        random_policy(), [scripted_task("1?", *turns)], KEY
    ).rows
    assert len(rows) > 1 and {row.ending for row in rows} == {Ending.ERROR}


def test_settings_without_room_are_refused() -> None:
    def check(settings: Truncate | Summarize, positions: int = 40) -> None:
        Compactor(settings, TOKENIZER, positions, 6).check()

    check(summarizing())
    with pytest.raises(ConfigError) as caught:
        check(summarizing(limit=34))
    assert str(caught.value) == (
        "rollout.compaction.limit=34: a row has 40 positions, of which a summary and its request take 11: "
        "set rollout.compaction.limit to 28 or less"
    )
    with pytest.raises(ConfigError, match=r"rollout\.compaction: of the 17 positions .* no room for a turn of 6"):
        check(summarizing(), 17)
    with pytest.raises(DataError, match="not in the alphabet"):
        check(summarizing(request="Hello"))
    with pytest.raises(DataError, match="not in the alphabet"):
        check(summarizing(header="Hello"))


def test_how_a_summary_enters_the_prompt() -> None:
    """Thoughts stay behind; a prompt that ends with something else than a user's text gets a message of its own."""
    compactor = Compactor(summarizing(), TOKENIZER, 40, 6)
    user = {"role": "user", "content": "do"}
    assert compactor.prompt(Reset([user]), "<think>\nhm\n</think>\n\nfound 3 \n") == [
        {"role": "user", "content": "do < found 3"}
    ]
    system = {"role": "system", "content": "be"}
    assert compactor.prompt(Reset([user, system]), "x") == [user, system, {"role": "user", "content": "< x"}]
    assert user == {"role": "user", "content": "do"}


def test_rows_of_a_prompt_share_it() -> None:
    """Whatever the number of rows of each episode: the same scores as rows apart, from fewer positions."""
    collector = compacting(summarizing(), positions=76, group_size=2)
    tasks = [scripted_task(start + "0123456789" * 2, *TASK.data["turns"]) for start in ("a", "bc")]
    rows = collector(random_policy(), tasks, KEY).rows
    laid, layout = lay_out(rows, group=3, prompt_bucket=4, bucket=4)
    place = [b for b, row in enumerate(laid) if row is not None]
    assert layout.group == 3 and len(place) == len(rows) < len(laid)
    assert all(laid[at] is row for at, row in zip(place, rows, strict=True))
    for b in range(0, len(laid), 3):
        assert len({row.group for row in laid[b : b + 3] if row is not None}) == 1
    mesh = collector.sampler.mesh
    shared, apart = (
        pack(r, batch=len(laid), bucket=4, actions=76, mesh=mesh, layout=how)
        for r, how in ((laid, layout), (rows, Layout()))
    )

    def scored(params: Params, experience: Experience, how: Layout) -> tuple[jax.Array, jax.Array]:
        logp_BT = score_tokens(MODEL, params, experience, how, temperature=1.0).logp
        return (logp_BT * experience.logp_behavior_BT).sum(), logp_BT

    of = jax.jit(jax.grad(scored, has_aux=True), static_argnums=2)
    (got_grad, got), (want_grad, want) = (
        jax.device_get(of(random_policy(), e, how)) for e, how in ((shared, layout), (apart, Layout()))
    )
    for b, (at, row) in enumerate(zip(place, rows, strict=True)):
        n = len(row.token)
        np.testing.assert_allclose(got[at, :n], want[b, :n], rtol=0, atol=1e-5)
        assert int(shared.prefix_B[at]) == int(shared.prefix_B[at - at % 3])
    for x, y in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_sharing_that_reads_more_is_left_alone() -> None:
    """One row a prompt, in groups of four: three in four rows would be empty."""
    rows = compacting(Truncate(keep_turns=1), group_size=1)(random_policy(), [TASK], KEY).rows
    assert lay_out(rows[:1] + rows[2:3], group=4, prompt_bucket=4, bucket=4) == (rows[:1] + rows[2:3], Layout())
