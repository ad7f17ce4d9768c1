"""`jax`, `jax.numpy`, `optax` and the shape annotations of `jaxtyping`, loaded at first use.

A settings class is also the function it configures (a loss, an advantage estimator), so reading a config imports the
modules of those functions. With the proxies below that costs nothing until a number is computed: a mistyped key is
reported in well under a second, before jax starts. Modules that no config reaches import jax directly.
"""

from __future__ import annotations

import importlib
import sys
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

# Annotations are strings; only the tests evaluate them, and they load jaxtyping before anything of ours.
if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int
else:
    Bool = Float = Int = None

__all__ = ["Bool", "Float", "Int", "jax", "jnp", "optax"]
