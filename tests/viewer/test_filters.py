import pytest

from ppojax.viewer.filters import parse_filter
from ppojax.viewer.run import Place, Summary

PLACE = Place(0, 1, 0, 10)
SUMMARIES = [
    Summary(0, 0, "terminated", None, 1.0, 2, 30, "Hello <calc>", (PLACE,)),
    Summary(0, 1, "error", "TimeoutError", 0.0, 1, 12, "hello", (PLACE,)),
    Summary(1, 2, "truncated", None, -0.5, 9, 300, "[red] reward", (PLACE, PLACE)),
]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", [0, 1, 2]),
        ("failed", [1]),
        ("error", [1]),
        ("truncated", [2]),
        ("cut", []),
        ("!failed", [0, 2]),
        ("reward>0", [0]),
        ("reward<=0 turns>=2", [2]),
        ("reward=-0.5", [2]),
        ("turns!=1", [0, 2]),
        ("tokens<100 group=0", [0, 1]),
        ("rows>1", [2]),
        ("episode=1", [1]),
        ("HELLO", [0, 1]),
        ("<calc>", [0]),
        ("[red]", [2]),
        ("reward", [2]),
        ("!hello !reward>9", [2]),
        ("!", []),
    ],
)
def test_filters(text: str, numbers: list[int]) -> None:
    assert [s.number for s in SUMMARIES if parse_filter(text)(s)] == numbers


@pytest.mark.parametrize(("text", "said"), [("reward>x", "reward>x: x is no"), ("turns=", "nothing is no number")])
def test_what_is_no_filter(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_filter(text)
