"""Given tokens into chosen slots: in any chunks and batches they are the full pass, and shapes are few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, log, log2
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.mesh import MeshConfig
from ppojax.models.forward import hidden_states, positions
from ppojax.planning.program import inspect
from ppojax.rollout import feed as feeding
from ppojax.rollout.board import Board
from ppojax.rollout.episode import Episode, LateEnv
from ppojax.rollout.feed import device_of, feed, heights, share_prompts, sizes, widths
from ppojax.rollout.sampler import SamplerDef, Slots, empty, extend, prefill, share
from tiny_model import MODEL, VOCAB, ScriptedEnv, random_policy, sampler_of

MESHES = {"one": MeshConfig(), "rows": MeshConfig(data=2), "rows and heads": MeshConfig(fsdp=2, tensor=2)}


def test_widths() -> None:
    assert [widths(n, 8) for n in (1, 8, 9, 33, 48, 49, 64, 70)] == [
        [8], [8], [16], [32, 8], [32, 16], [64], [64], [64, 8]
    ]  # fmt: skip
    assert widths(1100, 16) == [512, 512, 64, 16] and widths(5, 1) == [4, 1] and widths(0, 8) == []
    for smallest in (1, 5, 8, 16):
        for n in range(1, 1500):
            cut = widths(n, smallest)
            assert sum(cut) - cut[-1] < n <= sum(cut) and max(cut) <= max(2 * feeding.CHUNK, smallest)
            assert 3 * sum(cut) <= 4 * n + 24 * smallest


def test_heights() -> None:
    assert sizes(128, 1) == [128, 32, 8, 2, 1] and sizes(24, 4) == [24, 8, 4] and sizes(3, 1) == [3, 1]
    assert [heights(n, 32, 1) for n in (1, 2, 3, 4, 5, 16, 17, 32)] == [
        [1], [1, 1], [2, 2], [2, 2], [8], [8, 8], [32], [32]
    ]  # fmt: skip
    assert heights(20, 8, 8) == [8, 8, 8]


@pytest.mark.parametrize(
    ("slots", "smallest", "mesh"), [(1, 16, "one"), (6, 5, "one"), (96, 16, "one"), (96, 64, "rows"), (200, 8, "one")]
)
def test_shapes_are_few_whatever_the_lengths(
    slots: int, smallest: int, mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch of random lengths is asked for in one of W H shapes; nothing is compiled here."""
    sampler = sampler_of(mesh=MESHES[mesh].build(), positions=20_000)
    state = jax.eval_shape(lambda params: empty(params, sampler=sampler, count=slots), random_policy())
    asked: dict[str, set[tuple[Any, ...]]] = {"prefill": set(), "extend": set(), "share": set()}

    def note(name: str) -> Callable[..., Slots]:
        def program(*args: Any, sampler: SamplerDef, **static: bool) -> Slots:
            shapes = [a.shape for a in args if isinstance(a, np.ndarray)]
            asked[name].add((*shapes, *static.items()))
            return state

        return program

    for name in asked:
        monkeypatch.setattr(feeding, name, note(name))
    rng = np.random.default_rng(0)
    for _ in range(150):
        chosen = rng.permutation(slots)[: int(slots ** rng.uniform(0, 1.01))].tolist()
        longest = int(2 ** rng.uniform(0, 14))
        rows = {b: range(rng.integers(1, longest + 1)) for b in chosen}
        for prompt in (True, False):
            feed({}, state, rows, sampler=sampler, smallest=smallest, prompt=prompt)
        lengths = {b: len(ids) for b, ids in rows.items()}
        devices = MESHES[mesh].row_shards
        first = {device_of(b, slots, devices): b for b in reversed(chosen)}
        share_prompts(state, {b: first[device_of(b, slots, devices)] for b in chosen}, lengths, sampler=sampler)
    W, H = 1 + ceil(log2(feeding.CHUNK / smallest)), 1 + ceil(log(slots, 4))
    assert len(asked["prefill"]) <= W * H and len(asked["extend"]) <= 2 * W * H and len(asked["share"]) <= H
    assert len(asked["prefill"]) > W or slots == 1  # the bound is not idle


@pytest.mark.parametrize("mesh", MESHES)
def test_any_chunks_and_batches_are_the_full_pass(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 1 to 37 tokens into some of 8 slots, observations into others, prompts shared, slots used again."""
    monkeypatch.setattr(feeding, "FEW", 0)
    monkeypatch.setattr(feeding, "CHUNK", 16)
    params, rng = random_policy(), np.random.default_rng(0)
    sampler = sampler_of(mesh=MESHES[mesh].build())
    slots = empty(params, sampler=sampler, count=8)
    held: dict[int, list[int]] = {}

    def ids(n: int) -> list[int]:
        return rng.integers(1, VOCAB, n).tolist()

    def read(rows: Mapping[int, list[int]], *, prompt: bool, slots: Slots) -> Slots:
        for b, new in rows.items():
            held[b] = list(new) if prompt else held[b] + new
        return feed(params, slots, rows, sampler=sampler, smallest=4, prompt=prompt)

    def check(slots: Slots) -> None:
        token_BT = np.zeros((8, 64), np.int32)
        for b, row in held.items():
            token_BT[b, : len(row)] = row
        hidden_BTD, *_ = hidden_states(MODEL, params, jnp.asarray(token_BT), positions(jnp.asarray(token_BT)))
        for b, row in held.items():
            assert int(slots.length_B[b]) == len(row)
            np.testing.assert_allclose(slots.hidden_BD[b], hidden_BTD[b, len(row) - 1], rtol=1e-5, atol=1e-5)

    slots = read({1: ids(37), 3: ids(1), 6: ids(20)}, prompt=True, slots=slots)
    prompts = {b: list(row) for b, row in held.items()}
    slots = share_prompts(slots, {0: 1, 4: 6, 5: 4}, {0: 37, 4: 20, 5: 20}, sampler=sampler)
    held |= {0: list(held[1]), 4: list(held[6]), 5: list(held[6])}
    check(slots)
    slots = read({0: ids(5), 1: ids(21), 4: ids(2), 6: ids(9)}, prompt=False, slots=slots)
    slots = read({b: ids(b % 3 + 1) for b in (0, 1, 3, 4, 5, 6)}, prompt=False, slots=slots)
    check(slots)
    # A slot goes back to its prompt, another takes it from a row that has gone on, and one begins anew.
    slots = share_prompts(slots, {1: 1, 7: 6}, {1: 37, 7: 20}, sampler=sampler)
    slots = read({6: ids(11)}, prompt=True, slots=slots)
    held |= {1: prompts[1], 7: prompts[6]}
    check(slots)
    slots = read({1: ids(3), 6: ids(3), 7: ids(17)}, prompt=False, slots=slots)
    check(slots)


def test_nothing_travels_between_slots() -> None:
    """Each device reads, writes and copies the slots that it holds; a second cache is needed nowhere."""
    sampler, rows = sampler_of(mesh=MESHES["rows"].build(), positions=512), np.zeros(8, np.int32)
    params = random_policy()
    slots = empty(params, sampler=sampler, count=16)
    tokens, cache = np.zeros((8, 8), np.int32), sum(x.nbytes for x in slots.cache) / 2
    lowered = {
        "prefill": prefill.lower(params, slots, tokens, rows, rows, sampler=sampler),
        "extend": extend.lower(params, slots, tokens, rows, rows, sampler=sampler),
        "share": share.lower(slots, rows, rows, rows, sampler=sampler),
    }
    programs = {name: inspect(name, program, sampler.mesh) for name, program in lowered.items()}
    assert [c for program in programs.values() for c in program.collectives] == []
    assert programs["share"].memory.new < cache / 4  # one of 8 slots
    assert programs["prefill"].memory.new < cache / 2
    assert programs["extend"].memory.new < 1.5 * cache  # half of the slots, taken out, and what is read of them
    with pytest.raises(AssertionError, match="on one device"):
        share_prompts(slots, {0: 8}, {0: 3}, sampler=sampler)


def test_prompts_are_read_once_on_each_device_that_plays_them() -> None:
    """Three groups of four in eight slots of two devices: groups lie together, then where there is room."""
    sampler = sampler_of(mesh=MESHES["rows"].build())
    board = Board(random_policy(), sampler, 8, smallest=4, share=True)
    prompts = [[3, 5 + n, 9] for n in range(3)]
    ready = [Episode(LateEnv(ScriptedEnv), n // 4, n, [], list(prompts[n // 4])) for n in range(12)]
    playing = board.admit(ready)
    groups = [None if e is None else e.group for e in board.held]
    assert [playing[n].number for n in range(8)] == list(range(8)) and groups == [0] * 4 + [1] * 4
    for slot in (1, 2, 6):
        board.leave(cast(Episode, board.held[slot]))
    board.admit(ready)
    assert [None if e is None else e.group for e in board.held] == [0, 2, 2, 0, 1, 1, 2, 1]
    assert board.slots.length_B.tolist() == [3] * 8
    token_BT = jnp.asarray([cast(Episode, e).token for e in board.held])
    hidden_BTD, *_ = hidden_states(MODEL, random_policy(), token_BT, positions(token_BT))
    np.testing.assert_allclose(board.slots.hidden_BD, hidden_BTD[:, -1], rtol=1e-5, atol=1e-5)
