"""The base of every settings class."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Component(BaseModel):
    """Settings that are also the thing they configure: frozen, hashable (a static argument of jit), strict.

    Unknown keys, NaN and infinities are refused; a field that allows an infinite value says so itself. Collections
    are tuples, so that an instance stays hashable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, defer_build=True)
