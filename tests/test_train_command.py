"""`python -m ppojax.train`: what it leaves behind, how it is stopped and resumed, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.test_hf import write
from ppojax.cli import run_command
from ppojax.envs import Calculator
from ppojax.models.tokenizer import char_tokenizer
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.metrics import read_metrics
from ppojax.runtime.transcripts import read_transcripts
from ppojax.train import main
from ppojax.trainer import Trainer, playing
from tiny_config import tiny, tiny_run

# And what is told of a checkpoint with the step after it, which a killed run never tells.
CLOCKS = ("time", "timing_s/", "perf/", "compile/", "ckpt/")


@pytest.fixture(autouse=True)
def promotion_that_optax_needs() -> Any:
    with jax.numpy_dtype_promotion("standard"):
        yield


def start(arguments: Sequence[str], cache: Path) -> subprocess.Popen[str]:
    """Start a run in a process of its own, with one device and a cache of compiled programs."""
    env = os.environ | {
        "XLA_FLAGS": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA complains of its own slowness on a busy machine
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, "-m", "ppojax.train", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=600)
    return process.returncode, err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock or on a kill."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read_metrics(run / "metrics.jsonl")]


def checkpoint(run: Path, step: int, *arguments: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    with Checkpoints(run / "checkpoints", tiny().checkpoint) as checkpoints:
        state, meta = checkpoints.restore(step, Trainer(tiny(*arguments)).state())
    return [np.asarray(x) for x in jax.tree.leaves(state)], meta


@pytest.mark.slow  # four processes, each of which starts jax
@pytest.mark.parametrize("mode", ["sync", "one_step_off"])
def test_a_run_that_was_killed_or_stopped_goes_on_as_if_it_had_not(mode: str, tmp_path: Path) -> None:
    """SIGKILL after a checkpoint, SIGTERM later: the same metrics and the same last checkpoint, bit by bit."""
    settings = ("steps=8", "checkpoint.every=2", "checkpoint.keep=9", "eval.every=4", "eval.prompts=4")
    settings = (*settings, f"rollout.mode={mode}")
    cache = tmp_path / "cache"
    code, err = finished(start(tiny_run(tmp_path, *settings, "run.name=whole"), cache))
    assert (code, err) == (0, "")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = json.loads((whole / "exit.json").read_text())
    assert done | {"hint": ""} == {"code": 0, "reason": "done", "step": 8, "last_checkpoint": 8, "hint": ""}

    again = tiny_run(tmp_path, *settings, "run.name=cut", "resume=true")
    process = start(again, cache)
    wait_for(cut / "checkpoints" / "2", process)
    process.kill()
    assert finished(process)[0] == -signal.SIGKILL
    assert not (cut / "exit.json").exists()
    assert not (cut / "checkpoints" / "8").exists(), "killed too late to show anything"

    process = start(again, cache)
    wait_for(cut / "checkpoints" / "4", process)
    process.send_signal(signal.SIGTERM)
    code, err = finished(process)
    record = json.loads((cut / "exit.json").read_text())
    if code:  # the last step may have been over
        assert code == record["code"] == 75 and record["last_checkpoint"] == record["step"] >= 4
        last = err.splitlines()[-1]
        assert last == (f"ppojax: error: stopped by SIGTERM after step {record['step']}, saved: resume=true goes on")
        code, err = finished(start(again, cache))
    assert (code, err) == (0, "")

    assert max(row.get("reward/max", 0) for row in rows(whole)) > 0
    assert rows(cut) == rows(whole)
    (got, got_meta), (want, want_meta) = (checkpoint(run, 8, settings[-1]) for run in (cut, whole))
    assert got_meta == want_meta
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_a_run_leaves_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("steps=2", "eval.every=2", "eval.prompts=2", "checkpoint.every=1")
    arguments = tiny_run(tmp_path, *overrides)
    assert run_command(main, arguments) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "rollouts", "checkpoints", "exit.json",
    }  # fmt: skip
    assert [path.name for path in sorted((run / "rollouts").iterdir())] == ["step_000001.jsonl", "step_000002.jsonl"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "2"}
    assert tiny(f"run.dir={tmp_path}", *overrides).to_yaml() == (run / "config.yaml").read_text()
    logged = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2]
    assert "val/success" in logged[0] and "val/success" in logged[2] and "val/success" not in logged[1]
    assert "ckpt/step" not in logged[1] and logged[2]["ckpt/step"] == 1 and logged[2]["ckpt/blocked_s"] > 0
    assert logged[1]["perf/actor_tflops"] > 0
    for row in read_transcripts(run / "rollouts" / "step_000002.jsonl"):
        # Only where the policy chose; near 1, since one optimizer step lies between at most.
        assert [x > 0 for x in row["ratio"]] == [bool(a) for a in row["action"]] and max(row["ratio"]) < 10
        assert all(a or not m for a, m in zip(row["action"], row["mask"], strict=True))
    out, err = capsys.readouterr()
    assert str(run) in out.replace("\n", "") and err == ""
    # The directory is taken now.
    assert run_command(main, arguments) == 2
    assert "the run directory is not empty; use resume=true" in capsys.readouterr().err


def fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run_command(main, arguments)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("ppojax: error: "), err
    return code, err[0].removeprefix("ppojax: error: ")


LOADED = ("model.fresh=null", "model.tokenizer=null")
MANY = (
    "mesh.data=16",
    "update.microbatch_rows=16",
    "rollout.prompts=16",
    "update.shared_prefix=false",
    "warm_start=null",
)
HEADS = ("model.fresh.heads=4", "model.fresh.kv_heads=4")
REFUSED = [
    (("actor.optimizer.learning_rte=1",), 2, "unknown key actor.optimizer.learning_rte (command line); did you mean"),
    (("actor.optimizer.learning_rate=nan",), 2, "actor.optimizer.learning_rate=nan (command line): expected"),
    (MANY, 2, "mesh 16x1x1x1 (data x fsdp x expert x tensor) needs 16 devices"),
    (
        ("rollout.devices=own", "rollout.mesh.data=8"),
        2,
        "rollout.mesh 8x1x1x1 (data x fsdp x expert x tensor) needs 8 devices beside the trainer's 1, 7 more found: "
        "make mesh or rollout.mesh smaller, or set rollout.devices=shared",
    ),
    (("mesh.tensor=4", *HEADS), 2, "mesh.tensor = 4 does not divide vocab = 102"),
    (("model.path=/nowhere/model.gguf", *LOADED), 3, "/nowhere/model.gguf"),
    (("model.path=/nowhere/at/all", *LOADED), 3, "model.path: /nowhere/at/all is "),
    (("env.train_size=1",), 3, "env: 1 training tasks, rollout.prompts asks for 4"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_start_says_so_and_leaves_nothing(
    arguments: tuple[str, ...], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, line = fault(capsys, *tiny_run(tmp_path, "steps=2"), *arguments)
    assert got == code and text in line
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder as Hugging Face writes them, with 20 rows of embedding for 101 ids."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    tokenizer = char_tokenizer(map(chr, range(32, 127)))
    (folder / "tokenizer.json").write_text(tokenizer._full.to_str())
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    config = {"chat_template": template, "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    got, line = fault(capsys, *tiny_run(tmp_path), f"model.path={folder}", "model.fresh=null", "model.tokenizer=null")
    assert got == 3
    assert line == (
        f"model.path {folder}: the tokenizer has 101 ids, the embedding 20 rows: "
        "use the tokenizer that the weights were trained with"
    )
    shutil.rmtree(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_over_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some tasks of each split are tried before anything is written."""
    small = ("rollout.max_tokens=8", "rollout.max_turn_tokens=4", "warm_start=null")
    got, line = fault(capsys, *tiny_run(tmp_path, *small, "env.prompt='Please add {question} for me'"))
    assert got == 3 and "tokens, rollout.max_tokens leaves room for 6" in line
    assert list(tmp_path.iterdir()) == []


def test_environments_that_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None that can start is a fault of the data before anything is written; too many that fail later are one too."""
    monkeypatch.setattr(playing, "PAUSE_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Calculator, "make", lambda self: (_ for _ in ()).throw(OSError("no licence")))
        got, line = fault(capsys, *tiny_run(tmp_path, "warm_start=null"))
    assert got == 3 and line.startswith("env: none of the 8 tasks that were tried can be started, expected some; ")
    assert line.endswith("(OSError: no licence): mend the environment or its tasks")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(type(Calculator().make()), "step", lambda self, message: None)
    got, line = fault(capsys, *tiny_run(tmp_path, "warm_start=null", "rollout.retries=1"))
    assert got == 3 and line.startswith(
        "rollout: too much failed 2 times in a row, the last time 100% of the episodes ("
    )
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (record["code"], record["reason"], record["step"]) == (3, line, 0)


def test_a_run_that_diverges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that turns to NaN after its first step is given up, and the checkpoint from before stands."""
    step = Trainer.step

    def poisoned(self: Trainer) -> Any:
        out = step(self)
        params = self.states.actor.params
        self.states.actor = self.states.actor._replace(params=params | {"norm": params["norm"] * np.float32(np.nan)})
        return out

    monkeypatch.setattr(Trainer, "step", poisoned)
    settings = ("steps=9", "update.max_skipped=3", "checkpoint.every=1")
    got, line = fault(capsys, *tiny_run(tmp_path, *settings))
    assert got == 4 and line.startswith("actor: gradients were not finite in 4 updates in a row")
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["code"] == 4 and record["reason"] == line and record["step"] == record["last_checkpoint"] == 2


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [*tiny_run(tmp_path, "steps=3"), "--dry-run"]) == 0
    assert "ok: 3 steps of 8 episodes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
