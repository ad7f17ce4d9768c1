"""Weights from files to devices: tensor by tensor, each device's part by itself, checked on the way.

The host never holds a second copy of the model: a small parameter is put together whole, a large stack of blocks is
made on the devices and filled block by block. Files are mapped into memory one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ppojax.errors import DataError
from ppojax.models.families.layout import Place, Rule, Rules, Shape, get, places, put
from ppojax.models.spec import DecoderSpec

Params = dict[str, Any]
LARGE = 64 << 20  # bytes of a stack from which on its blocks go to the devices one by one
_BLOCK = 1 << 17  # numbers that are converted at a time: they stay in the cache
_EXPONENT = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file or a folder.

    Attributes:
        where: the file or folder, for errors.
        model_type: the kind of model that they should make up, for errors.
        shapes: of each, known without reading any.
        fetch: reads one; best as a memory-mapped array, of which only what is used is read.
    """

    where: str
    model_type: str
    shapes: Mapping[str, Shape]
    fetch: Callable[[str], np.ndarray]


def read_params(
    tensors: Tensors,
    spec: DecoderSpec,
    rules: Rules,
    *,
    unread: tuple[str, ...] = (),
    dtype: str = "float32",
    shardings: Params | None = None,
) -> Params:
    """Read the parameters of a decoder: layers stacked on a leading axis, matrices [in, out].

    Args:
        rules: under which names and how the parameters lie in the files.
        unread: beginnings and endings of names of tensors that may be there and are not read.
        dtype: of the parameters.
        shardings: of each parameter, in their tree; None: all on one device.

    Raises:
        DataError: a tensor is missing, surplus, mis-shaped or not finite. All but the last are found before any is
            read.
    """
    chosen = [(place, place.rule_for(tensors.shapes)) for place in places(spec, rules)]
    heads = tuple(rule.name for rule in rules["head"]) if spec.tied else ()  # a tied model does not read its head
    _check(tensors, chosen, unread + heads)
    params: Params = {}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for place, rule in chosen:
        sharding = one if shardings is None else get(shardings, place.path)
        reader = _Reader(tensors, place, rule, rule.order(spec) if rule.order else None, np.dtype(dtype))
        put(params, place.path, reader.read(sharding))
    return params


def _check(tensors: Tensors, chosen: list[tuple[Place, Rule]], unread: tuple[str, ...]) -> None:
    where, wanted = tensors.where, set()
    for place, rule in chosen:
        shape = rule.file_shape(place.inner)
        for name in (name for names in place.names(rule) for name in names):
            wanted.add(name)
            if name not in tensors.shapes:
                raise DataError(
                    f"{where}: tensor {name} is missing, expected shape {shape}; the export is not complete"
                )
            if tuple(tensors.shapes[name]) != shape:
                raise DataError(
                    f"{where}: tensor {name} has shape {tuple(tensors.shapes[name])}, expected {shape} from the config"
                )
    for name in tensors.shapes:
        if name not in wanted and not name.endswith(unread) and not name.startswith(unread):
            raise DataError(
                f"{where}: tensor {name} is not part of a {tensors.model_type} decoder; use a supported architecture"
            )


@dataclass(frozen=True)
class _Reader:
    """Reads one parameter."""

    tensors: Tensors
    place: Place
    rule: Rule
    order: np.ndarray | None
    dtype: np.dtype

    def read(self, sharding: Any) -> jax.Array:
        """The whole parameter, on its devices."""
        shape = self.place.shape
        if self.place.start is None or self.dtype.itemsize * int(np.prod(shape)) <= LARGE:
            return _place(shape, sharding, self.part)
        stack = jnp.zeros(shape, self.dtype, device=sharding)
        one = sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            one = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
        fill = _filler(sharding)
        for n in range(shape[0]):
            block = _place(shape[1:], one, lambda index, n=n: self.part((slice(n, n + 1), *index))[0])
            stack = jax.block_until_ready(fill(stack, block, n))
        return stack

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the parameter, on the host."""
        ranges = [range(*s.indices(size)) for s, size in zip(index, self.place.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], self.dtype)
        names = self.place.names(self.rule)
        if self.place.start is None:
            self._fill(out, names[0][0], index)
            return out
        for slot, n in enumerate(ranges[0]):
            if not self.rule.by_expert:
                self._fill(out[slot], names[n][0], index[1:])
                continue
            for place, e in enumerate(ranges[1]):
                self._fill(out[slot, place], names[n][e], index[2:])
        return out

    def _fill(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        view = self.rule.view(self.tensors.fetch(name))
        view = view[index] if self.order is None else view[*index[:-1], self.order[index[-1]]]
        # Along the axis that is outermost in the file, some numbers at a time.
        axis = int(np.argmax(view.strides))
        step = max(1, _BLOCK * view.shape[axis] // view.size)
        for start in range(0, view.shape[axis], step):
            at = (slice(None),) * axis + (slice(start, start + step),)
            if not _copy(out[at], view[at]):
                raise DataError(f"{self.tensors.where}: tensor {name} holds NaN or infinite values; download it again")


def _copy(out: np.ndarray, part: np.ndarray) -> bool:
    """Convert and transpose; say whether all numbers were finite."""
    block = np.array(part, order="K")
    exponent = _EXPONENT.get(block.dtype)
    if exponent is None:
        finite = np.isfinite(block).all()
    else:
        finite = ((block.view(np.uint16) & exponent) != exponent).all()
    if exponent is not None and block.dtype == out.dtype:
        out.view(np.uint16)[...] = block.view(np.uint16)
    else:
        out[...] = block.astype(out.dtype, order="K", copy=False)
    return bool(finite)


def _place(shape: Shape, sharding: Any, part: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """Put an array on its devices; parts that several devices hold are made once."""
    made: dict[tuple, np.ndarray] = {}

    def once(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = tuple((s.start, s.stop) for s in index)
        if key not in made:
            made[key] = part(index)
        return made[key]

    return jax.make_array_from_callback(shape, sharding, once)


@lru_cache(maxsize=64)
def _filler(sharding: Any) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Set one block of a stack in place."""
    return jax.jit(
        lambda stack, block, n: jax.lax.dynamic_update_index_in_dim(stack, block, n, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
