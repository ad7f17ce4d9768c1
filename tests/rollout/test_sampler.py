"""Prefill, extend and decode are the full forward pass, and nothing depends on where a row lies."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.experience.pack import pack
from ppojax.models.forward import hidden_states, logits, positions, score_tokens
from ppojax.rollout.sampler import SamplerDef, Slots, Turn, decode, extend, pad_tokens, prefill
from ppojax.types import Ending, Records, Row
from tiny_model import MODEL, TOKENIZER, VOCAB, random_policy, sampler_of, speaker, stops

PROMPTS = [[3, 9, 10], [3, 11, 12, 13, 14, 15, 8], [3, 20]]
EOS = TOKENIZER.eos_ids[0]
score = jax.jit(score_tokens, static_argnames=("model", "temperature"))


def start(prompts: Sequence[Sequence[int]], sampler: SamplerDef, group: int = 1, seed: int = 0) -> Slots:
    token_PT, length_P = pad_tokens(prompts, 4, sampler.slots)
    return prefill(random_policy(seed), token_PT, length_P, sampler=sampler, group_size=group)


def turn(
    slots: Slots, sampler: SamplerDef, key: int = 0, active: Sequence[bool] | None = None, stop: jax.Array | None = None
) -> tuple[Slots, Turn]:
    B = slots.length_B.shape[0]
    active_B = np.ones(B, bool) if active is None else np.array(active)
    table = stops() if stop is None else stop
    episode_B = np.arange(B, dtype=np.int32)
    return decode(random_policy(), slots, active_B, episode_B, jax.random.key(key), table, sampler=sampler)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logps_are_those_of_the_full_forward(temperature: float) -> None:
    """Two turns with observations of several lengths and of none between them, against one pass over the row."""
    sampler = sampler_of(temperature=temperature)
    # Several tokens stop a turn, so that turns end at different lengths.
    table = stops(eos=range(EOS, VOCAB, 4))
    slots, first = turn(start(PROMPTS, sampler, group=2), sampler, stop=table)
    observations = [[5, 9, 4], [], [6], [5, 9, 10, 11, 4], [], [7, 8]]
    token_BT, count_B = pad_tokens(observations, 4, sampler.slots)
    slots = extend(random_policy(), slots, token_BT, count_B, sampler=sampler)
    slots, second = turn(slots, sampler, key=1, active=[True, True, True, True, False, True], stop=table)

    rows = []
    for b in range(6):
        parts, logp, mask = [np.array(PROMPTS[b // 2])], [np.zeros(len(PROMPTS[b // 2]))], [0] * len(PROMPTS[b // 2])
        for written, seen in ((first, observations[b]), (second, [])):
            n = int(written.count_B[b])
            parts += [np.asarray(written.token_BN[b, :n]), np.array(seen)]
            logp += [np.asarray(written.logp_BN[b, :n]), np.zeros(len(seen))]
            mask += [1] * n + [0] * len(seen)
        token, behavior = (np.concatenate(x) for x in (parts, logp))
        assert len(token) == int(slots.length_B[b])
        rows.append(
            Row(
                token.astype(np.int32), np.array(mask, bool), behavior.astype(np.float32),
                np.zeros(len(token), np.float32), b // 2, b, 0, Ending.TERMINATED,
            )
        )  # fmt: skip
    assert len({row.action.sum() for row in rows}) > 2 and int(second.count_B[4]) == 0
    experience = pack(rows, batch=6, bucket=8, actions=12, mesh=sampler.mesh)
    trainer_BT = score(MODEL, random_policy(), experience, temperature=temperature).logp
    # The same float32 sums in another order, over 2 blocks: a few units of 2^-23 on log-probabilities of order 5.
    assert float(jnp.abs(trainer_BT - experience.logp_behavior_BT).max()) < 1e-5
    # What the sampler keeps of a row's last token is what the full pass finds there.
    hidden_BTD, *_ = hidden_states(MODEL, random_policy(), experience.token_BT, positions(experience.token_BT))
    last_BD = hidden_BTD[np.arange(6), np.asarray(slots.length_B) - 1]
    np.testing.assert_allclose(slots.hidden_BD, last_BD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_recorded_is_the_distribution_that_was_drawn_from(temperature: float) -> None:
    """The head of the recorded state gives every log-probability; the likeliest tokens come with theirs."""
    sampler = sampler_of(temperature=temperature, records=Records(5, hidden=True))
    plain = sampler_of(temperature=temperature)
    _, got = turn(start(PROMPTS, sampler), sampler)
    _, bare = turn(start(PROMPTS, plain), plain)
    np.testing.assert_array_equal(got.token_BN, bare.token_BN)
    np.testing.assert_allclose(got.logp_BN, bare.logp_BN, rtol=0, atol=2e-6)  # of another program
    assert jax.tree.leaves(bare.recorded) == []
    kept = got.recorded
    logp_BNV = jax.nn.log_softmax(logits(MODEL, random_policy()["head"], kept.hidden) / temperature, axis=-1)
    written = np.arange(6) < np.asarray(got.count_B)[:, None]
    drawn = np.take_along_axis(np.asarray(logp_BNV), np.asarray(got.token_BN)[:, :, None], 2)[..., 0]
    np.testing.assert_allclose(got.logp_BN[written], drawn[written], rtol=0, atol=2e-6)
    top = np.take_along_axis(np.asarray(logp_BNV), np.asarray(kept.top_id), 2)
    np.testing.assert_allclose(kept.top_logp[written], top[written], rtol=0, atol=2e-6)
    assert np.all(np.sort(np.asarray(logp_BNV), 2)[:, :, -5][written] <= top.min(2)[written] + 2e-6)
    assert not np.all((np.asarray(kept.top_id) == np.asarray(got.token_BN)[:, :, None]).any(2)[written])


def test_greedy_writes_the_argmax_of_the_full_forward() -> None:
    sampler = sampler_of(greedy=True)
    _, got = turn(start(PROMPTS, sampler), sampler, stop=stops(eos=()))
    for b, prompt in enumerate(PROMPTS):
        row = np.array([[*prompt, *np.asarray(got.token_BN[b])]], np.int32)
        hidden_BTD, *_ = hidden_states(MODEL, random_policy(), jnp.asarray(row), positions(jnp.asarray(row)))
        logits_TV = hidden_BTD[0] @ random_policy()["head"].T
        np.testing.assert_array_equal(np.asarray(logits_TV).argmax(1)[len(prompt) - 1 : -1], row[0, len(prompt) :])


def test_a_draw_does_not_depend_on_slot_batch_or_neighbours() -> None:
    """Every episode alone, in reverse order, and beside others gives the same tokens; logps up to rounding."""
    sampler, policy, key = sampler_of(), random_policy(), jax.random.key(3)

    def play(order: Sequence[int]) -> dict[int, tuple[list[int], list[float]]]:
        slots = start([PROMPTS[e % 3] for e in order], sampler)
        active_B, episode_B = np.ones(len(order), bool), np.array(order, np.int32)
        _, got = decode(policy, slots, active_B, episode_B, key, stops(), sampler=sampler)
        return {e: (got.token_BN[b].tolist(), got.logp_BN[b].tolist()) for b, e in enumerate(order)}

    whole, backwards = play(range(6)), play(range(5, -1, -1))
    alone = {e: play([e])[e] for e in range(6)}
    for e in range(6):
        assert whole[e][0] == backwards[e][0] == alone[e][0]
        # A product of 1 row and of 6 rows may sum in another order.
        np.testing.assert_allclose(whole[e][1], alone[e][1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(whole[e][1], backwards[e][1], rtol=1e-5, atol=1e-5)
    assert whole[0][0] != whole[3][0]  # the same prompt, another episode


def test_another_key_or_turn_draws_anew() -> None:
    sampler = sampler_of(turn_tokens=12)
    a, b = (turn(start(PROMPTS, sampler), sampler, key=key)[1].token_BN for key in (0, 1))
    assert not np.array_equal(a, b)


def test_temperature_sharpens() -> None:
    """As it falls, sampling becomes greedy; the log-probability is that of the sharpened distribution."""
    cold, greedy = sampler_of(temperature=1e-3), sampler_of(greedy=True)
    _, drawn = turn(start(PROMPTS, cold), cold)
    _, best = turn(start(PROMPTS, greedy), greedy)
    np.testing.assert_array_equal(drawn.token_BN, best.token_BN)
    # A runner-up 3.5e-3 behind in logits still has e^-3.5 of the mass.
    assert np.asarray(drawn.logp_BN).min() > -0.1 and np.asarray(best.logp_BN).max() < -0.5


def spoken(text: str, stop: Sequence[str], **changes: int) -> tuple[str, Turn]:
    """What a policy that would say `text` says before something stops it."""
    sampler = sampler_of(**changes)
    token_PT, length_P = pad_tokens([TOKENIZER.render([{"role": "user", "content": "a"}])], 4, sampler.slots)
    slots = prefill(speaker(text), token_PT, length_P, sampler=sampler, group_size=1)
    one_B, zero_B = np.ones(1, bool), np.zeros(1, np.int32)
    _, got = decode(speaker(text), slots, one_B, zero_B, jax.random.key(0), stops(stop), sampler=sampler)
    return TOKENIZER.decode(got.token_BN[0, : int(got.count_B[0])].tolist()), got


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
def test_a_stop_string_ends_a_turn(stop: tuple[str, ...], said: str, stopped: bool) -> None:
    text, got = spoken("abcdefgh", stop)
    assert (text, bool(got.stopped_B[0])) == (said, stopped)


def test_eos_ends_a_turn_and_is_an_action() -> None:
    text, got = spoken("ab", ())
    assert text == "ab" and int(got.count_B[0]) == 3 and int(got.token_BN[0, 2]) == EOS and bool(got.stopped_B[0])
    assert not np.asarray(got.token_BN[0, 3:]).any()  # nothing is written behind the end


def test_the_end_of_the_cache_ends_a_turn() -> None:
    """The prompt is <|user|> a <|im_end|> <|assistant|>: with 7 slots there is room for 3 tokens."""
    text, got = spoken("abcdef", (), slots=7)
    assert text == "abc" and not bool(got.stopped_B[0])


def test_rows_that_are_not_active_stay_as_they_are() -> None:
    sampler = sampler_of()
    before = jax.device_get(start(PROMPTS, sampler))
    slots, got = turn(start(PROMPTS, sampler), sampler, active=[False, True, False])
    assert got.count_B.tolist()[::2] == [0, 0] and int(got.count_B[1]) > 0
    for b in (0, 2):
        assert int(slots.length_B[b]) == before.length_B[b]
        np.testing.assert_array_equal(slots.hidden_BD[b], before.hidden_BD[b])
        np.testing.assert_array_equal(slots.cache.k[:, b], before.cache.k[:, b])
    full = start(PROMPTS, sampler)._replace(length_B=jnp.full(3, sampler.slots, jnp.int32))
    assert turn(full, sampler)[1].count_B.tolist() == [0, 0, 0]


def test_pad_tokens() -> None:
    token_BT, count_B = pad_tokens([[5], [], [1, 2, 3, 4, 6]], 4, 100)
    assert token_BT.tolist() == [[5] + [0] * 7, [0] * 8, [1, 2, 3, 4, 6, 0, 0, 0]] and count_B.tolist() == [1, 0, 5]
    assert pad_tokens([[1, 2, 3, 4, 6]], 4, 6)[0].shape == (1, 6)  # not over the limit
    assert pad_tokens([[]], 4, 100)[0].shape == (1, 4)
