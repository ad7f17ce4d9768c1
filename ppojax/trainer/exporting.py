"""A run's policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from ppojax.config import Config
from ppojax.models.families import family_for
from ppojax.models.hf_write import SHARD_BYTES, Origin, write_hf
from ppojax.models.source import find_source
from ppojax.runtime.rundir import RunDir
from ppojax.trainer.held_out import restored
from ppojax.trainer.trainer import Trainer


def export_trainer(
    trainer: Trainer, out: Path | str, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the policy of a live run, adapters merged; see `hf_write.write_hf`.

    The folder has the model type and the tokenizer of the model that was trained; one from scratch is a Llama.

    Raises:
        ConfigError: the folder is there and not empty.
        CannotWriteError: the disk refuses.
    """
    spec, path = trainer.parts.actor.spec, trainer.config.model.path
    origin, family = Origin(trainer.parts.tokenizer), None
    if path is not None:
        source = find_source(path)
        origin, family = Origin(trainer.parts.tokenizer, source.folder, source.config), source.family
    family = family or family_for(spec)
    write_hf(out, family, spec, trainer.merged_policy(), origin, dtype=dtype, shard_bytes=shard_bytes)


def export_run(
    config: Config, run: RunDir, out: Path, *, checkpoint: int | None, dtype: str, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write the policy of a checkpoint, the newest intact one for None; return its step.

    Raises:
        DataError: there is no such checkpoint, or it is damaged.
    """
    trainer = restored(config, run, checkpoint, "step")
    export_trainer(trainer, out, dtype=dtype, shard_bytes=shard_bytes)
    return trainer.number
