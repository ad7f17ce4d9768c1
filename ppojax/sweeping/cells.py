"""The cells of a sweep: mesh shapes times micro-batches times critics, each a few settings on top of a config."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from ppojax.config import Config
from ppojax.errors import ConfigError
from ppojax.mesh import AXES

AS_IN_CONFIG = "-"
SHORT = ("data", "fsdp", "tensor")  # what three numbers of a mesh stand for


class Cell(NamedTuple):
    """What one cell sets; `-` leaves a setting as the config has it."""

    mesh: str = AS_IN_CONFIG  # devices along each axis: 2x4x1x1
    microbatch: str = AS_IN_CONFIG
    critic: str = AS_IN_CONFIG

    @property
    def name(self) -> str:
        """A folder's name; of a path that is none, with a digest that tells it from others."""
        said = ".".join(f"{field}_{value}" for field, value in self._asdict().items() if value != AS_IN_CONFIG)
        name = re.sub(r"[^\w.=-]+", "_", said) or "config"
        return name if name == said or not said else f"{name}.{hashlib.sha256(said.encode()).hexdigest()[:8]}"

    def arguments(self) -> tuple[str, ...]:
        """What it sets, as arguments of the command line."""
        out: list[str] = []
        if self.mesh != AS_IN_CONFIG:
            out += [f"mesh.{axis}={size}" for axis, size in zip(AXES, self.mesh.split("x"), strict=True)]
        if self.microbatch != AS_IN_CONFIG:
            out.append(f"update.microbatch_rows={self.microbatch}")
        if self.critic != AS_IN_CONFIG:
            out += _critic_arguments(self.critic)
        return tuple(out)

    def config(self, arguments: Sequence[str]) -> Config:
        """The config of the cell. Raises ConfigError where there is none, with all that is wrong."""
        return Config.load(*arguments, *self.arguments())


def cells_of(mesh: str, microbatch: str, critic: str) -> list[Cell]:
    """Every combination, meshes outermost; what is empty stays as the config has it.

    Raises:
        ConfigError: an entry cannot be read.
    """
    meshes = [_mesh(part) for part in _parts(mesh)]
    microbatches = [_microbatch(part) for part in _parts(microbatch)]
    critics = [_critic(part) for part in _parts(critic)]
    none = [AS_IN_CONFIG]
    found = [Cell(*values) for values in product(meshes or none, microbatches or none, critics or none)]
    return list(dict.fromkeys(found))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _mesh(text: str) -> str:
    sizes = text.lower().split("x")
    if len(sizes) not in (len(SHORT), len(AXES)) or not all(re.fullmatch(r"[1-9]\d{0,4}", size) for size in sizes):
        raise ConfigError(
            f"mesh={text}: expected devices along {' x '.join(SHORT)}, such as 1x8x1, or along {' x '.join(AXES)}"
        )
    if len(sizes) == len(AXES):
        return "x".join(sizes)
    given: dict[str, str] = dict(zip(SHORT, sizes, strict=True))
    return "x".join(given.get(axis, "1") for axis in AXES)


def _microbatch(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise ConfigError(f"microbatch={text}: expected rows of a micro-batch, such as 8,16")
    return text


_CUT = re.compile(r"(?:([1-9]\d{0,2})x)?([1-9]\d{0,3})")  # critics x blocks


def _critic(text: str) -> str:
    if not _CUT.fullmatch(text) and not re.search(r"[/.~A-Za-z]", text):
        raise ConfigError(
            f"critic={text}: expected blocks of a critic that is cut from the actor, such as 6, critics x blocks, such "
            "as 2x6, or what critic.model.path may be"
        )
    return text


def _critic_arguments(text: str) -> list[str]:
    found = _CUT.fullmatch(text)
    if found is None:
        return ["critic.model.type=pretrained", f"critic.model.path={text}"]
    count, layers = found.groups()
    counted = [f"critic.count={count}"] if count else []
    return ["critic.model.type=cut", f"critic.model.layers={layers}", *counted]
