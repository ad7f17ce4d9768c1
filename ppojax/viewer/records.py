"""A row of a transcript as it is read back: every field is checked, nothing in the file is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ppojax.errors import DataError

FLOAT32 = 3.5e38  # just above the largest one: what is shown is summed and squared
Numbers = list[Annotated[float, Field(ge=-FLOAT32, le=FLOAT32)] | None]


class Record(BaseModel):
    """One row of `ppojax.runtime.transcripts.write_transcripts`. Fields that older runs did not write are None."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    group: int
    episode: int
    segment: int
    ending: Literal["terminated", "truncated", "cut", "error"]
    error: str | None = None
    clipped: bool | None = None
    token: list[int]
    text: list[str]
    action: list[Literal[0, 1]]
    reward: Numbers
    logp_behavior: Numbers
    advantage: Numbers | None = None
    value: list[Numbers] | None = None  # of each critic
    value_end: Numbers | None = None  # of each critic
    ratio: Numbers | None = None
    mask: list[Literal[0, 1]] | None = None

    @model_validator(mode="after")
    def _as_long_as_the_tokens(self) -> Record:
        lengths = {
            "text": self.text,
            "action": self.action,
            "reward": self.reward,
            "logp_behavior": self.logp_behavior,
            "advantage": self.advantage,
            "ratio": self.ratio,
            "mask": self.mask,
            **{f"value.{m}": value for m, value in enumerate(self.value or [])},
        }
        for name, entries in lengths.items():
            if entries is not None and len(entries) != len(self.token):
                raise ValueError(f"{name} has {len(entries)} entries for {len(self.token)} tokens")
        if self.value_end is not None and len(self.value_end) != len(self.value or []):
            raise ValueError(f"value_end has {len(self.value_end)} entries for {len(self.value or [])} critics")
        return self


def parse_record(line: bytes, path: Path, number: int) -> Record:
    """Read line `number` of a transcript. Raises DataError, naming the place and the field."""
    try:
        return Record.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        said = f"{field}: {first['msg']:.100}" if field else first["msg"]
    except (ValueError, RecursionError) as error:
        said = f"no JSON ({error})"
    raise DataError(
        f"{path}:{number}: {said}, expected a row of a transcript; remove the file, or copy it again if it was cut off"
    )
