"""Given tokens into chosen slots: in any chunks and batches they are the full pass, and shapes are few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, log, log2
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppojax.mesh import MeshConfig
from ppojax.models.forward import hidden_states, positions
from ppojax.rollout import feed as feeding
from ppojax.rollout.feed import feed, heights, share_prompts, sizes, widths
from ppojax.rollout.sampler import SamplerDef, Slots, empty
from tiny_model import MODEL, VOCAB, random_policy, sampler_of

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
        share_prompts(state, dict.fromkeys(chosen, chosen[0]), lengths, sampler=sampler)
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
    slots = share_prompts(slots, {0: 1, 4: 6, 5: 1}, {0: 37, 4: 20, 5: 37}, sampler=sampler)
    held |= {0: list(held[1]), 4: list(held[6]), 5: list(held[1])}
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
