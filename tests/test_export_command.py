"""`python -m ppojax.export`: a run's policy, as a folder that loads again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from ppojax import export
from ppojax.cli import run_command
from ppojax.config import Config
from ppojax.export import ExportConfig
from ppojax.models import load
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.rundir import RunDir
from ppojax.trainer import Trainer
from ppojax.trainer.exporting import export_trainer
from tiny_config import TINY, tiny


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(tiny())


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path) -> RunDir:
    return save(trainer, tmp_path / "run")


def save(trainer: Trainer, folder: Path) -> RunDir:
    """A run that has stopped after one step."""
    run = RunDir(folder)
    run.create()
    run.write_config(trainer.config.to_yaml())
    with Checkpoints(run.checkpoints, trainer.config.checkpoint) as checkpoints:
        checkpoints.save(1, trainer.state(), trainer.position())
    return run


def command(*arguments: str) -> int:
    return run_command(export.main, arguments, ExportConfig)


def test_a_checkpoint_becomes_a_folder_that_loads(run: RunDir, trainer: Trainer, tmp_path: Path) -> None:
    assert command(f"run={run.path}", f"out={tmp_path}/out", "dtype=float32", "step=1") == 0
    model = load(tmp_path / "out")
    assert model.family.model_type == "llama"
    assert model.spec == trainer.parts.actor.spec
    jax.tree.map(np.testing.assert_array_equal, model.params, trainer.states.actor.params)
    assert model.tokenizer is not None
    assert model.tokenizer.fingerprint() == trainer.parts.tokenizer.fingerprint()


def test_the_policy_of_a_live_run(trainer: Trainer, tmp_path: Path) -> None:
    export_trainer(trainer, tmp_path / "out", dtype="bfloat16")
    stored = load(tmp_path / "out").params["embed"]
    np.testing.assert_array_equal(stored, trainer.states.actor.params["embed"].astype("bfloat16").astype("float32"))


def test_faults_of_the_arguments(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"run={tmp_path}/none", f"out={tmp_path}/out") == 2
    assert f"run={tmp_path}/none: there is no run" in capsys.readouterr().err
    assert command(f"run={run.path}", f"out={run.path}") == 2
    assert f"out={run.path}: is there and not empty; give a new folder" in capsys.readouterr().err
    assert command(f"run={run.path}") == 2
    assert "out" in capsys.readouterr().err
    assert command(f"run={run.path}", f"out={tmp_path}/out", "--dry-run") == 0
    assert command(f"run={run.path}", f"out={tmp_path}/out", "step=7") == 3
    assert re.search(r"step=7: .* has none of that step; the newest is 1, step=latest", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert command("--help") == 0
    assert "python -m ppojax.export" in capsys.readouterr().out


def test_a_run_with_adapters(trainer: Trainer, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoint becomes a merged model, or the adapters beside the base that they were trained on."""
    export_trainer(trainer, tmp_path / "base", dtype="float32")
    rest = [argument for argument in TINY if not argument.startswith("model.")]
    adapted = Trainer(Config.load(*rest, f"model.path={tmp_path}/base", "model.lora={rank: 2}"))
    layers = adapted.states.actor.params["layers"]
    layers["lora"] = jax.tree.map(lambda p: p + 0.1, layers["lora"])
    written = save(adapted, tmp_path / "adapted")
    assert command(f"run={written.path}", f"out={tmp_path}/merged", "dtype=float32") == 0
    stored = load(tmp_path / "merged").params
    jax.tree.map(np.testing.assert_array_equal, stored, adapted.merged_policy())
    assert not np.array_equal(stored["layers"]["q"], adapted.parts.actor_base["layers"]["q"])

    assert command(f"run={written.path}", f"out={tmp_path}/adapter", "dtype=float32", "adapter=true") == 0
    assert "the adapters of step 1 are in" in " ".join(capsys.readouterr().out.split())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (f"{tmp_path}/base", 2)
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", framework="np") as file:
        found = file.get_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    np.testing.assert_array_equal(found, layers["lora"]["q"]["b"][0].T)

    assert command(f"run={run.path}", f"out={tmp_path}/none", "adapter=true", "--dry-run") == 2
    assert "adapter=true: model.lora is null, expected a run with adapters" in capsys.readouterr().err
