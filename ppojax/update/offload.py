"""Train states that rest in the host's memory while the devices are somebody else's."""

from __future__ import annotations

from typing import Any

import jax

from ppojax.errors import ConfigError
from ppojax.types import TrainState
from ppojax.update.settings import Offload

HOST = "pinned_host"


def rest(state: TrainState, what: Offload) -> TrainState:
    """Move the optimizer state, or the parameters too, to the host; each device its part. No number changes."""
    if what == "none":
        return state
    resting = state._replace(opt_state=_move(state.opt_state, HOST))
    return resting if what == "optimizer" else resting._replace(params=_move(state.params, HOST))


def wake(tree: Any) -> Any:
    """Bring back to the devices what rests; the rest stays where it is."""
    return _move(tree, None)


def _move(tree: Any, kind: str | None) -> Any:
    """Copy arrays to a kind of memory (None: the devices' own), together, so that the copies overlap."""
    kind = kind or jax.local_devices()[0].default_memory().kind
    if all(x.sharding.memory_kind == kind for x in jax.tree.leaves(tree)):
        return tree
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))


def check_host_memory(what: Offload, key: str, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError where something is to rest and the devices reach no memory of the host."""
    device = mesh.devices.flat[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if what != "none" and HOST not in kinds:
        raise ConfigError(
            f"{key}={what}: {device.platform} devices reach memory of the kinds {', '.join(kinds)}, expected {HOST}; "
            f"set {key}=none"
        )
