"""`jax`, `jax.numpy` and `optax`, loaded at first use.

A settings class is also the function it configures (a loss, an advantage estimator), so reading a config imports the
modules of those functions. With the proxies below that costs nothing until a number is computed: a mistyped key is
reported in well under a second, before jax starts. Modules that no config reaches import jax directly.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import jax as jax
    import jax.numpy as jnp
    import optax as optax
else:
    jax = _LazyModule("jax")
    jnp = _LazyModule("jax.numpy")
    optax = _LazyModule("optax")

__all__ = ["jax", "jnp", "optax"]
