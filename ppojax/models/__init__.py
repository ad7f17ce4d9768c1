"""Models: decoder, critics, weights in and out, tokenizers. Outside, a model is a `ModelDef` and a dict.

```python
from ppojax.models import export, load

model = load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
logits_BTV = model.logits(model.params, token_BT)
export(model, "copy")
```
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from ppojax.models.api import Model


def load(path: str | Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Model:
    """Load a model: `smollm2`, a GGUF file, a Hugging Face folder, or a hub id.

    Args:
        dtype: float32, bfloat16 or float16, of the weights and of the computation.
        mesh: the devices that hold it, each its part; None: one.

    Raises:
        DataError: the model is not there, of a kind that is not supported, or its files are damaged.
    """
    from ppojax.models.api import load_from

    return load_from(path, dtype, mesh)


def export(
    model: Model,
    path: str | Path,
    params: dict[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as a Hugging Face folder that transformers loads; it is there whole or not at all.

    Args:
        params: weights to write instead of the model's own.
        dtype: of the weights in the files; None: as they are.
        shard_bytes: most bytes of weights in one file.

    Raises:
        ConfigError: the folder is there and not empty.
        CannotWriteError: the disk refuses.
    """
    from ppojax.models.api import export_to

    export_to(model, path, params, dtype, shard_bytes)
