"""A run's policy as a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path

from ppojax.config import Config
from ppojax.models.families import family_for
from ppojax.models.hf_write import SHARD_BYTES, Origin, write_hf
from ppojax.models.peft_write import write_peft
from ppojax.models.source import find_source
from ppojax.runtime.rundir import RunDir
from ppojax.trainer.held_out import restored
from ppojax.trainer.trainer import Trainer

log = logging.getLogger(__name__)


def export_trainer(
    trainer: Trainer,
    out: Path | str,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: bool = False,
) -> None:
    """Write the policy of a live run, adapters merged (`hf_write`) or, with `adapter`, by themselves (`peft_write`).

    The folder has the model type and the tokenizer of the model that was trained; one from scratch is a Llama.

    Raises:
        ConfigError: the folder is there and not empty, or there are no adapters, or no base that PEFT could load.
        CannotWriteError: the disk refuses.
    """
    spec, path = trainer.parts.actor.spec, trainer.config.model.path
    origin, family = Origin(trainer.parts.tokenizer), None
    if path is not None:
        source = find_source(path)
        origin, family = Origin(trainer.parts.tokenizer, source.folder, source.config), source.family
    family = family or family_for(spec)
    if adapter:
        lora, base = trainer.config.model.adapters()
        if origin.folder is None:
            log.warning(
                "adapter_config.json names %s, which PEFT cannot open: write the base as a folder with "
                "ppojax.models.export(load(%r), FOLDER), and load the adapters beside that",
                *(base, base),
            )
        write_peft(out, family, spec, trainer.policy(), lora, origin, base=base, dtype=dtype or "float32")
        return
    write_hf(out, family, spec, trainer.merged_policy(), origin, dtype=dtype, shard_bytes=shard_bytes)


def export_run(
    config: Config,
    run: RunDir,
    out: Path,
    *,
    checkpoint: int | None,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    adapter: bool = False,
) -> int:
    """Write the policy of a checkpoint, the newest intact one for None; return its step.

    Raises:
        DataError: there is no such checkpoint, or it is damaged.
    """
    trainer = restored(config, run, checkpoint, "step")
    export_trainer(trainer, out, dtype=dtype, shard_bytes=shard_bytes, adapter=adapter)
    return trainer.number
