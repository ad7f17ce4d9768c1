"""Cells: what the lists on the command line stand for, and which cells cannot be."""

from __future__ import annotations

import pytest

from ppojax.errors import ConfigError
from ppojax.sweeping.cells import Cell, cells_of
from ppojax.sweeping.run import check
from tiny_config import TINY


def test_every_combination_is_a_cell() -> None:
    assert cells_of("", "", "") == [Cell()] and Cell().arguments() == () and Cell().name == "config"
    assert cells_of("1x8x1, 1x8x1x1", "", "") == [Cell("1x8x1x1")]  # the same mesh twice is one
    cells = cells_of("1x8x2,2x1x4x1", "8,16", "")
    assert [tuple(cell) for cell in cells] == [
        ("1x8x1x2", "8", "-"),
        ("1x8x1x2", "16", "-"),
        ("2x1x4x1", "8", "-"),
        ("2x1x4x1", "16", "-"),
    ]
    assert cells[0].name == "mesh_1x8x1x2.microbatch_8"
    assert cells[2].arguments() == (
        "mesh.data=2", "mesh.fsdp=1", "mesh.expert=4", "mesh.tensor=1", "update.microbatch_rows=8",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("critic", "wanted"),
    [
        ("6", ("critic.model.type=cut", "critic.model.layers=6")),
        ("2x6", ("critic.model.type=cut", "critic.model.layers=6", "critic.count=2")),
        ("Qwen/Qwen3-0.6B", ("critic.model.type=pretrained", "critic.model.path=Qwen/Qwen3-0.6B")),
    ],
)
def test_critics(critic: str, wanted: tuple[str, ...]) -> None:
    (cell,) = cells_of("", "", critic)
    assert cell.arguments() == wanted and "/" not in cell.name


def test_no_two_critics_share_a_folder() -> None:
    names = [cell.name for cell in cells_of("", "", "a/b,a_b,a//b,~/a,2x6")]
    assert len(set(names)) == 5 and names[1] == "critic_a_b" and names[4] == "critic_2x6"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("8x1", "", ""), "mesh=8x1: expected devices along data x fsdp x tensor, such as 1x8x1, or along data x fsdp"),
        (("1x0x1", "", ""), "mesh=1x0x1: expected devices"),
        (("", "8,x", ""), "microbatch=x: expected rows of a micro-batch, such as 8,16"),
        (
            ("", "", "0"),
            "critic=0: expected blocks of a critic that is cut from the actor, such as 6, critics x blocks",
        ),
    ],
)
def test_what_cannot_be_read(arguments: tuple[str, str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cells_of(*arguments)
    assert str(caught.value).startswith(text)


def test_cells_that_cannot_be_say_why() -> None:
    assert check(Cell("1x2x1x1"), TINY) == []
    fault = check(Cell("1x3x1x1"), TINY)[0]
    assert "mesh.fsdp=3 (command line), model.fresh.width=32 (command line): width is split over mesh.fsdp" in fault
    assert "mesh.fsdp may be 1, 2, 4, 8, 16, 32" in fault
    assert "update.microbatch_rows=3" in "".join(check(Cell("2x1x1x1", "3"), TINY))
