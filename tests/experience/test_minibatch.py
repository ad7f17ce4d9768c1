"""Splitting, joining and dealing out rows: nothing is lost, doubled or torn from its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import random_experience
from ppojax.experience.minibatch import join_rows, minibatches, put_back, split_rows, take_rows
from ppojax.mesh import MeshConfig
from ppojax.types import Batch, Experience, Recorded

MESH = MeshConfig().build()
SPLIT, JOIN = jax.jit(split_rows, static_argnums=(1, 2)), jax.jit(join_rows, static_argnums=1)


def numbered(prompts: int, group: int, mesh: MeshConfig | None = None) -> Batch:
    """A batch of which every array says the number of its row."""
    experience, _ = random_experience(prompts, group, mesh=mesh)
    row_B = jnp.arange(prompts * group, dtype=jnp.float32)
    value_MBT = jnp.stack([row_B, row_B + 100])[:, :, None]
    row_BT = row_B[:, None] + jnp.zeros_like(experience.reward_BT)
    scored = experience._replace(
        logp_old_BT=row_BT,
        value_MBT=value_MBT + jnp.zeros((1, 1, row_BT.shape[1])),
        recorded=Recorded(hidden=row_B[:, None, None] + jnp.zeros((1, 3, 2))),
        hidden_ref_BAD=row_B[:, None, None] + jnp.zeros((1, 3, 2)),
    )
    return Batch(scored, row_BT, scored.value_MBT)


def rows_in(batch: Batch) -> list[int]:
    """Numbers of the rows, after checking that all arrays agree on them."""
    batch = jax.device_get(batch)
    row, e = batch.advantage_BT[:, 0], batch.experience
    assert e.value_MBT is not None and e.logp_old_BT is not None and batch.return_MBT is not None
    for x in (e.value_MBT[0, :, 0], e.value_MBT[1, :, 0] - 100, batch.return_MBT[0, :, 0], e.logp_old_BT[:, 0]):
        np.testing.assert_array_equal(x, row)
    for hidden in (e.recorded.hidden, e.hidden_ref_BAD):
        np.testing.assert_array_equal(hidden[:, 0, 0], row)
    np.testing.assert_array_equal(e.episode_B, row)
    return [int(r) for r in row]


@settings(max_examples=30, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 2, 3]),
    parts=st.sampled_from([1, 2, 3]),
    rest=st.sampled_from([(), (2,)]),
)
def test_joining_undoes_splitting(group: int, groups: int, parts: int, rest: tuple[int, ...]) -> None:
    shape = (group * groups * parts, *rest)
    x = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    nothing = Experience(*[None] * 12)  # pyright: ignore[reportArgumentType]
    split = SPLIT(nothing._replace(reward_BT=x), group * groups, group).reward_BT
    assert split.shape == (parts, group * groups, *rest)
    np.testing.assert_array_equal(JOIN(split, group), x)
    # Groups stay whole, and part i begins with group i.
    row = np.arange(len(x)).reshape(-1, group)[:parts].reshape(parts, group)
    np.testing.assert_array_equal(np.asarray(split)[:, :group], x[row])


def test_every_array_of_a_part_is_of_the_same_rows() -> None:
    parts = split_rows(numbered(4, 2), 4, 2)
    dealt = [rows_in(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(2)]
    assert dealt == [[0, 1, 4, 5], [2, 3, 6, 7]]
    with pytest.raises(AssertionError, match="8 rows do not split into parts of 3"):
        split_rows(numbered(4, 2), 3)
    with pytest.raises(AssertionError, match="parts of 2 rows would tear groups of 4"):
        split_rows(numbered(2, 4), 2, 4)


def test_a_part_keeps_every_device_busy_with_its_own_rows() -> None:
    """With rows over four devices, each part has rows of all four: nothing moves between them."""
    batch = numbered(4, 2, MeshConfig(data=4))
    owner = {}
    for shard in batch.experience.episode_B.addressable_shards:
        owner |= {int(row): shard.device.id for row in np.asarray(shard.data)}
    parts = split_rows(batch, 4)
    for i in range(2):
        rows = rows_in(jax.tree.map(lambda x, i=i: x[i], parts))
        assert [owner[row] for row in rows] == sorted(set(owner.values()))


@pytest.mark.parametrize(("count", "group"), [(1, 1), (2, 1), (4, 2), (2, 4), (8, 1)])
def test_minibatches_are_a_shuffle_of_whole_groups(count: int, group: int) -> None:
    batch = numbered(8 // group, group)
    parts = list(minibatches(batch, count, (0, 1, 2), group, MESH))
    dealt = [rows_in(part) for part in parts]
    back_BT = put_back([np.asarray(part.advantage_BT) for part in parts], (0, 1, 2), group)
    np.testing.assert_array_equal(back_BT, batch.advantage_BT)
    assert [len(rows) for rows in dealt] == [8 // count] * count
    flat = [row for rows in dealt for row in rows]
    assert sorted(flat) == list(range(8))
    for first in range(0, 8, group):
        assert flat[first] % group == 0 and flat[first : first + group] == list(range(flat[first], flat[first] + group))


def test_the_shuffle_follows_from_the_seed() -> None:
    batch = numbered(8, 1)

    def order(*seed: int) -> list[int]:
        return [row for part in minibatches(batch, 4, seed, 1, MESH) for row in rows_in(part)]

    assert order(0, 1, 2, 0) == order(0, 1, 2, 0)
    assert len({tuple(order(0, step, epoch, who)) for step in range(2) for epoch in range(2) for who in range(2)}) == 8


def test_taking_rows_takes_them_everywhere() -> None:
    assert rows_in(take_rows(numbered(4, 2), jnp.asarray([5, 0, 5]), mesh=MESH)) == [5, 0, 5]


def test_minibatches_lie_over_the_mesh_as_their_batch_does() -> None:
    config = MeshConfig(data=2, fsdp=2)
    batch = numbered(8, 1, config)
    for part in minibatches(batch, 2, (0,), 1, config.build()):
        assert part.experience.token_BT.sharding.is_equivalent_to(batch.experience.token_BT.sharding, 2)
        assert {shard.data.shape[1] for shard in part.experience.value_MBT.addressable_shards} == {1}
