"""Hints: the critics read them before the row, and nothing else changes its place."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from helpers import CRITIC, params, random_rows
from ppojax.experience.pack import layout_of, pack
from ppojax.mesh import MeshConfig
from ppojax.models.forward import predict, values
from ppojax.types import Row

MESH = MeshConfig().build()
VALUES = jax.jit(values, static_argnums=(0, 3))
HINTS = [np.arange(5, 8, dtype=np.int32), np.arange(9, 10, dtype=np.int32)]


def hinted(rows: list[Row], *, written: bool) -> list[Row]:
    """Rows of two prompts with hints: beside the row, or written before its first token as tokens like any."""
    out = []
    for row in rows:
        hint = HINTS[row.group]
        if not written:
            out.append(Row(**{**vars(row), "hint": hint}))
            continue
        columns = {
            name: np.concatenate([np.zeros(len(hint), vars(row)[name].dtype), vars(row)[name]])
            for name in ("token", "action", "logp_behavior", "reward")
        }
        columns["token"][: len(hint)] = hint
        out.append(Row(**{**vars(row), **columns}))
    return out


@pytest.mark.parametrize("share", [False, True])
def test_values_are_of_the_row_behind_its_hint(share: bool) -> None:
    """As if the hint were the start of the prompt; gradients too; rows that fill the batch stay finite."""
    rows = random_rows(2, 2)
    beside, before = (hinted(rows, written=written) for written in (False, True))
    layouts = [layout_of(r, group=2 if share else 1, prompt_bucket=4) for r in (beside, before)]
    got_e, want_e = (
        pack(r, batch=6, bucket=4, actions=16, mesh=MESH, layout=how)
        for r, how in zip((beside, before), layouts, strict=True)
    )
    assert got_e.hint_BH.shape == (6, 4) and want_e.hint_BH is None
    np.testing.assert_array_equal(got_e.hint_length_B, [3, 3, 1, 1, 0, 0])

    def read(p, e, how):
        value_BT = values(CRITIC, p, e, how)[0]
        return jax.numpy.where(e.action_BT, value_BT, 0.0).sum(), value_BT

    run = jax.jit(jax.value_and_grad(read, has_aux=True), static_argnums=2)
    p = params(CRITIC)
    got_e, want_e = jax.device_get((got_e, want_e))
    ((_, got), got_grad), ((_, want), want_grad) = run(p, got_e, layouts[0]), run(p, want_e, layouts[1])
    assert got.shape == got_e.token_BT.shape and np.isfinite(got).all()
    got, want = np.asarray(got), np.asarray(want)
    for b, row in enumerate(rows):
        h, first, n = len(HINTS[row.group]), int(row.action.argmax()), len(row.token)
        np.testing.assert_allclose(got[b, first : n + 1], want[b, h + first : h + n + 1], rtol=1e-5, atol=1e-6)
    for x, y in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    output = jax.eval_shape(lambda p, e: predict(CRITIC, p, e, layouts[0]).output_MBTK, p, got_e)
    assert output.shape == (1, *got_e.token_BT.shape, 1)


def test_a_hint_changes_the_value() -> None:
    rows = random_rows(2, 2)
    with_hints, without = (
        pack(r, batch=4, bucket=4, actions=16, mesh=MESH) for r in (hinted(rows, written=False), rows)
    )
    assert without.hint_BH is None
    a, b = (np.asarray(VALUES(CRITIC, params(CRITIC), e))[0] for e in (with_hints, without))
    action = np.asarray(without.action_BT)
    assert np.abs(a - b)[action].min() > 0
