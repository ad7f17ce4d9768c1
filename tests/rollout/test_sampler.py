"""Prefill, extend and decode are the full forward pass, and nothing depends on where a row lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.experience.pack import pack
from ppojax.models.forward import Params, hidden_states, logits, positions, score_tokens
from ppojax.rollout.decode import Turns, begin_turn, decode, no_turns
from ppojax.rollout.draw import Cuts
from ppojax.rollout.feed import feed, share_prompts
from ppojax.rollout.sampler import SamplerDef, Slots, empty
from ppojax.types import Ending, Recorded, Records, Row
from tiny_model import MODEL, TOKENIZER, VOCAB, random_policy, sampler_of, speaker, stops

PROMPTS = [[3, 9, 10], [3, 11, 12, 13, 14, 15, 8], [3, 20]]
EOS = TOKENIZER.eos_ids[0]


class Turn(NamedTuple):
    """What a turn of each slot wrote."""

    token: list[list[int]]
    logp: list[list[float]]
    stopped: np.ndarray
    recorded: list[Recorded]


score = jax.jit(score_tokens, static_argnames=("model", "temperature"))
states = jax.jit(hidden_states, static_argnums=0)


def start(prompts: Sequence[Sequence[int]], sampler: SamplerDef, group: int = 1, policy: Params | None = None) -> Slots:
    """Slots that hold each prompt `group` times, read once."""
    params, count = policy or random_policy(), group * len(prompts)
    rows = {group * i: list(prompt) for i, prompt in enumerate(prompts)}
    slots = feed(params, empty(params, sampler=sampler, count=count), rows, sampler=sampler, smallest=4, prompt=True)
    others = {b: b - b % group for b in range(count) if b % group}
    lengths = {b: len(rows[first]) for b, first in others.items()}
    return share_prompts(slots, others, lengths, sampler=sampler) if others else slots


def turn(
    slots: Slots,
    sampler: SamplerDef,
    *,
    key: int = 0,
    episodes: Sequence[int] | None = None,
    active: Sequence[bool] | None = None,
    stop: jax.Array | None = None,
    policy: Params | None = None,
) -> tuple[Slots, Turn]:
    """Whole turns, segment by segment."""
    B = slots.length_B.shape[0]
    turns, table = no_turns(B), stops() if stop is None else stop
    for b in range(B):
        if active is None or active[b]:
            begin_turn(turns, b, b if episodes is None else episodes[b], sampler.turn_tokens)
    pieces = []
    while not pieces or turns.live_B.any():
        slots, segment = decode(policy or random_policy(), slots, turns, jax.random.key(key), table, sampler=sampler)
        got = jax.device_get(segment)
        pieces.append(got)
        turns = Turns(got.live_B, turns.episode_B, got.state_B, turns.left_B - got.count_B)
    token, logp, kept = ([[] for _ in range(B)] for _ in range(3))
    for piece in pieces:
        for b, n in enumerate(piece.count_B.tolist()):
            token[b] += piece.token_BN[b, :n].tolist()
            logp[b] += piece.logp_BN[b, :n].tolist()
            kept[b].append(jax.tree.map(lambda x, b=b, n=n: x[b, :n], piece.recorded))
    recorded = [jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in kept]
    return slots, Turn(token, logp, pieces[-1].state_B == table.shape[0] - 1, recorded)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logps_are_those_of_the_full_forward(temperature: float) -> None:
    """Two turns with observations of several lengths and of none between them, against one pass over the row."""
    sampler = sampler_of(temperature=temperature)
    # Several tokens stop a turn, so that turns end at different lengths.
    table = stops(eos=range(EOS, VOCAB, 4))
    slots, first = turn(start(PROMPTS, sampler, group=2), sampler, stop=table)
    observations = [[5, 9, 4], [], [6], [5, 9, 10, 11, 4], [], [7, 8]]
    seen = {b: ids for b, ids in enumerate(observations) if ids}
    slots = feed(random_policy(), slots, seen, sampler=sampler, smallest=4, prompt=False)
    slots, second = turn(slots, sampler, key=1, active=[True, True, True, True, False, True], stop=table)

    rows = []
    for b in range(6):
        parts, logp, mask = [np.array(PROMPTS[b // 2])], [np.zeros(len(PROMPTS[b // 2]))], [0] * len(PROMPTS[b // 2])
        for written, shown in ((first, observations[b]), (second, [])):
            n = len(written.token[b])
            parts += [np.array(written.token[b], int), np.array(shown, int)]
            logp += [np.array(written.logp[b]), np.zeros(len(shown))]
            mask += [1] * n + [0] * len(shown)
        token, behavior = (np.concatenate(x) for x in (parts, logp))
        assert len(token) == int(slots.length_B[b])
        rows.append(
            Row(
                token.astype(np.int32), np.array(mask, bool), behavior.astype(np.float32),
                np.zeros(len(token), np.float32), b // 2, b, 0, Ending.TERMINATED,
            )
        )  # fmt: skip
    assert len({row.action.sum() for row in rows}) > 2 and not second.token[4]
    experience = pack(rows, batch=6, bucket=8, actions=12, mesh=sampler.mesh)
    trainer_BT = score(MODEL, random_policy(), experience, temperature=temperature).logp
    # The same float32 sums in another order, over 2 blocks: a few units of 2^-23 on log-probabilities of order 5.
    assert float(jnp.abs(trainer_BT - experience.logp_behavior_BT).max()) < 1e-5
    # What the sampler keeps of a row's last token is what the full pass finds there.
    hidden_BTD, *_ = states(MODEL, random_policy(), experience.token_BT, positions(experience.token_BT))
    last_BD = np.asarray(hidden_BTD)[np.arange(6), np.asarray(slots.length_B) - 1]
    np.testing.assert_allclose(slots.hidden_BD, last_BD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("temperature", "noise"), [(1.0, 0.0), (0.7, 0.5)])
def test_what_is_recorded_is_the_distribution_that_was_drawn_from(temperature: float, noise: float) -> None:
    """The head of the recorded state gives every log-probability; the likeliest tokens come with theirs."""
    sampler = sampler_of(temperature=temperature, hidden_noise=noise, records=Records(5, hidden=True))
    plain = sampler_of(temperature=temperature, hidden_noise=noise)
    _, got = turn(start(PROMPTS, sampler), sampler)
    _, bare = turn(start(PROMPTS, plain), plain)
    assert got.token == bare.token and jax.tree.leaves(bare.recorded) == []
    for b, kept in enumerate(got.recorded):
        token, logp = np.array(got.token[b]), np.array(got.logp[b])
        np.testing.assert_allclose(logp, bare.logp[b], rtol=0, atol=2e-6)  # of another program
        raw_NV = logits(MODEL, random_policy()["head"], jnp.asarray(kept.hidden)) / temperature
        logp_NV = np.asarray(jax.nn.log_softmax(raw_NV, axis=-1))
        np.testing.assert_allclose(logp, logp_NV[np.arange(len(token)), token], rtol=0, atol=2e-6)
        np.testing.assert_allclose(kept.top_logp, np.take_along_axis(logp_NV, kept.top_id, 1), rtol=0, atol=2e-6)
        assert np.all(np.sort(logp_NV, 1)[:, -5] <= kept.top_logp.min(1) + 2e-6)
    drawn = [id_K in top_K for kept, ids in zip(got.recorded, got.token, strict=True)
             for top_K, id_K in zip(kept.top_id, ids, strict=True)]  # fmt: skip
    assert not all(drawn)


def test_greedy_writes_the_argmax_of_the_full_forward() -> None:
    sampler = sampler_of(greedy=True)
    _, got = turn(start(PROMPTS, sampler), sampler, stop=stops(eos=()))
    for b, prompt in enumerate(PROMPTS):
        row = np.array([[*prompt, *got.token[b]]], np.int32)
        hidden_BTD, *_ = states(MODEL, random_policy(), row, np.arange(row.shape[1], dtype=np.int32)[None])
        logits_TV = np.asarray(hidden_BTD)[0] @ np.asarray(random_policy()["head"]).T
        np.testing.assert_array_equal(logits_TV.argmax(1)[len(prompt) - 1 : -1], row[0, len(prompt) :])


def test_a_draw_depends_on_episode_and_position_only() -> None:
    """Episodes alone, in reverse order, beside others, and in segments of any length: the same tokens, and logps up to
    the rounding of products of another shape."""

    def play(order: Sequence[int], segment: int = 64) -> dict[int, tuple[list[int], list[float]]]:
        sampler = sampler_of(segment=segment, turn_tokens=12)
        slots = start([PROMPTS[e % 3] for e in order], sampler)
        _, got = turn(slots, sampler, key=3, episodes=order, stop=stops(eos=range(EOS, VOCAB, 16)))
        return {e: (got.token[b], got.logp[b]) for b, e in enumerate(order)}

    whole = play(range(6))
    others = [play(range(5, -1, -1)), play(range(6), 1), play(range(6), 7), {e: play([e])[e] for e in range(6)}]
    for e, (token, logp) in whole.items():
        for other in others:
            assert other[e][0] == token
            np.testing.assert_allclose(other[e][1], logp, rtol=1e-5, atol=1e-5)
    assert whole[0][0] != whole[3][0]  # the same prompt, another episode
    assert len({len(token) for token, _ in whole.values()}) > 1


def test_another_key_draws_anew() -> None:
    sampler = sampler_of(turn_tokens=12)
    a, b = (turn(start(PROMPTS, sampler), sampler, key=key)[1].token for key in (0, 1))
    assert a != b


def test_temperature_sharpens() -> None:
    """As it falls, sampling becomes greedy; the log-probability is that of the sharpened distribution."""
    cold, greedy = sampler_of(temperature=1e-3), sampler_of(greedy=True)
    _, drawn = turn(start(PROMPTS, cold), cold)
    _, best = turn(start(PROMPTS, greedy), greedy)
    assert drawn.token == best.token
    # A runner-up 3.5e-3 behind in logits still has e^-3.5 of the mass.
    assert min(map(min, drawn.logp)) > -0.1 and max(map(min, best.logp)) < -0.5


def test_cuts_are_of_the_distribution_that_is_recorded() -> None:
    """Top-1 of three ways is the argmax, and certain; a wider cut has the mass of what stays."""
    best = turn(start(PROMPTS, sampler_of(greedy=True)), sampler_of(greedy=True))[1].token
    for cuts in (Cuts(top_k=1), Cuts(top_p=1e-6), Cuts(min_p=0.999)):
        sampler = sampler_of(cuts=cuts)
        _, got = turn(start(PROMPTS, sampler), sampler)
        assert got.token == best and np.abs(np.concatenate(got.logp)).max() == 0
    sampler = sampler_of(cuts=Cuts(top_k=3), records=Records(3), turn_tokens=40)
    _, got = turn(start(PROMPTS, sampler), sampler, stop=stops(eos=()))
    for token, logp, kept in zip(got.token, got.logp, got.recorded, strict=True):
        place_N = (kept.top_id == np.array(token)[:, None]).argmax(1)
        share_NK = np.exp(kept.top_logp - kept.top_logp.max(1, keepdims=True))
        want_N = np.log(share_NK / share_NK.sum(1, keepdims=True))[np.arange(len(token)), place_N]
        np.testing.assert_allclose(logp, want_N, rtol=0, atol=2e-6)
        assert all(id_K in top_K for top_K, id_K in zip(kept.top_id, token, strict=True)) and len(set(place_N)) == 3


def spoken(text: str, stop: Sequence[str], **changes: int) -> tuple[str, Turn]:
    """What a policy that would say `text` says before something stops it."""
    sampler, policy = sampler_of(**changes), speaker(text)
    slots = start([TOKENIZER.render([{"role": "user", "content": "a"}])], sampler, policy=policy)
    _, got = turn(slots, sampler, stop=stops(stop), policy=policy)
    return TOKENIZER.decode(got.token[0]), got


@pytest.mark.parametrize(
    ("stop", "said", "stopped"),
    [
        ((), "abcdef", False),  # the turn's limit of 6 tokens
        (("cd",), "abcd", True),  # spans two tokens
        (("gh", "ef", "bcd"), "abcd", True),  # the first of several
        (("bce",), "abcdef", False),
        (("h",), "abcdef", False),  # beyond the limit
    ],
)
@pytest.mark.parametrize("segment", [3, 32])  # "bcd" lies across two segments of 3
def test_a_stop_string_ends_a_turn(stop: tuple[str, ...], said: str, stopped: bool, segment: int) -> None:
    text, got = spoken("abcdefgh", stop, segment=segment)
    assert (text, bool(got.stopped[0])) == (said, stopped)


def test_eos_ends_a_turn_and_is_an_action() -> None:
    text, got = spoken("ab", ())
    assert text == "ab" and len(got.token[0]) == 3 and got.token[0][2] == EOS and bool(got.stopped[0])


def test_the_end_of_the_cache_ends_a_turn() -> None:
    """The prompt is <|user|> a <|im_end|> <|assistant|>: with 7 positions there is room for 3 tokens."""
    text, got = spoken("abcdef", (), positions=7)
    assert text == "abc" and not bool(got.stopped[0])


def test_slots_that_are_not_active_stay_as_they_are() -> None:
    sampler = sampler_of()
    before = jax.device_get(start(PROMPTS, sampler))
    slots, got = turn(start(PROMPTS, sampler), sampler, active=[False, True, False])
    assert got.token[::2] == [[], []] and got.token[1]
    for b in (0, 2):
        assert int(slots.length_B[b]) == before.length_B[b]
        np.testing.assert_array_equal(slots.hidden_BD[b], before.hidden_BD[b])
        np.testing.assert_array_equal(slots.cache.k[:, b], before.cache.k[:, b])
    full = start(PROMPTS, sampler)._replace(length_B=jnp.full(3, sampler.positions, jnp.int32))
    assert turn(full, sampler)[1].token == [[], [], []]
