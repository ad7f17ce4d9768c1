"""`python -m ppojax.critic_fit`: a critic out of stored rollouts, and a run that starts with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from ppojax import critic_fit
from ppojax.cli import run_command
from ppojax.config import Config
from ppojax.critic_fit import CriticFitConfig
from ppojax.models.settings import CutCritic
from ppojax.models.value_head import ArctanHead, LinearHead
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.rundir import RunDir
from ppojax.runtime.transcripts import read_rows, write_transcripts
from ppojax.settings import load_config
from ppojax.trainer import Trainer
from ppojax.trainer.fitting import held_out, stored_episodes
from ppojax.types import Ending
from tiny_config import TINY, tiny


@pytest.fixture(scope="module", autouse=True)
def promotion_that_optax_needs() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    trainer = Trainer(tiny("warm_start.corrupt=0.5"))
    trainer.warm_start()
    return trainer


@pytest.fixture(scope="module")
def run(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Three steps of eight episodes, and the policy after them."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "run")
    run.create()
    run.write_config(trainer.config.to_yaml())
    for _ in range(3):
        out = trainer.step()
        write_transcripts(run.transcript(out.step), out.rows, trainer.parts.tokenizer.decode)
    with Checkpoints(run.checkpoints, trainer.config.checkpoint) as checkpoints:
        checkpoints.save(3, trainer.state(), trainer.position())
    return run


def taking(critic: Path, *arguments: str) -> Trainer:
    """A run that starts with a fitted critic."""
    plain = [argument for argument in TINY if not argument.startswith("critic.model.")]
    return Trainer(Config.load(*plain, "critic.model.type=fitted", f"critic.model.path={critic}", *arguments))


def command(*arguments: str) -> int:
    return run_command(critic_fit.main, arguments, CriticFitConfig)


def test_rows_come_back_from_their_transcripts(run: RunDir) -> None:
    found = [row for rows in stored_episodes(run) for row in rows]
    assert len(found) == 24 and len({row.episode for row in found}) == 24 and len({row.group for row in found}) == 12
    raw = read_rows(run.transcript(2))
    for a, b in zip(raw, found[8:16], strict=True):
        np.testing.assert_array_equal(a.token, b.token)
        assert (b.group - a.group, b.episode - a.episode, a.ending) == (4, 8, b.ending)


def test_a_run_starts_with_what_was_fitted(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss falls, the folder says what it is, and values are the same numbers in a run that takes it."""
    out = tmp_path / "critic"
    fit = ("critic.model.layers=1", "critic.optimizer.learning_rate=3e-3", "passes=6", "held_out=0.2")
    assert command(f"run={run.path}", f"out={out}", *fit) == 0
    said = capsys.readouterr().out
    assert "explained variance on" in said and f"critic.model.path={out}" in said.replace("\n", "")
    about = json.loads((out / "critic.json").read_text())
    assert about["step"] == 3 and about["head"]["type"] == "linear" and len(about["explained_variance"]["by_part"]) == 5
    fitted = taking(out)
    assert fitted.states.critic is not None and fitted.parts.critic is not None
    head = np.asarray(fitted.states.critic.params["value_head"])
    assert head.any() and fitted.parts.critic.spec.layers == 1
    assert len(jax.tree.leaves(fitted.states.critic.params)) == 12
    with pytest.raises(Exception, match=r"its head is LinearHead.*critic\.head is ArctanHead"):
        taking(out, "critic.head.type=arctan")


def test_prompts_are_held_out_with_all_their_episodes(run: RunDir) -> None:
    """A prompt that comes again in another step is no other prompt."""
    found = stored_episodes(run)
    twice = [*found, *([replace(row, group=row.group + 100) for row in rows] for rows in found)]
    train, kept = held_out(twice, 0.3, 0)
    seen = [{tuple(rows[0].token[: int(rows[0].action.argmax())].tolist()) for rows in part} for part in (train, kept)]
    assert not seen[0] & seen[1] and len(train) + len(kept) == len(twice) and kept


def test_an_episode_may_have_more_rows_than_a_step(run: RunDir, trainer: Trainer, tmp_path: Path) -> None:
    longer = RunDir(tmp_path / "longer")
    shutil.copytree(run.path, longer.path)
    rows = read_rows(run.transcript(1))
    chain = [
        replace(rows[n % 8], episode=0, segment=n, ending=Ending.CUT if n < 9 else Ending.TERMINATED) for n in range(10)
    ]
    write_transcripts(longer.transcript(4), chain, trainer.parts.tokenizer.decode)
    assert command(f"run={longer.path}", f"out={tmp_path}/out", "passes=1") == 0


def stored(folder: Path, *arguments: str) -> RunDir:
    """The config of a run that was never played."""
    run = RunDir(folder / "stored")
    run.create()
    run.write_config(tiny(*arguments).to_yaml())
    return run


def test_what_is_not_given_is_the_run_s(tmp_path: Path) -> None:
    head = ("critic.head.type=arctan", "critic.head.low=-1", "critic.head.high=2", "critic.model.layers=1")
    run = stored(tmp_path, *head, "critic.optimizer.learning_rate=3e-3", "advantage.lambda_value=0.9")
    given = ("critic.head.low=-2", "critic.optimizer.beta2=0.9", "gae.gamma=0.5")
    fit = load_config(CriticFitConfig, [f"run={run.path}", f"out={tmp_path}/out", *given]).config
    assert fit.critic is not None and fit.gae is not None
    assert fit.critic.head == ArctanHead(low=-2, high=2)
    assert (fit.critic.optimizer.learning_rate, fit.critic.optimizer.beta2) == (3e-3, 0.9)
    assert (fit.gae.lambda_value, fit.gae.gamma) == (0.9, 0.5)
    other = load_config(CriticFitConfig, [f"run={run.path}", "out=x", "critic.head.type=linear"]).config.critic
    assert other is not None and other.head == LinearHead() and isinstance(other.model, CutCritic)
    assert other.model.layers == 1


def test_contradictions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that a training run would refuse, in one line, with the keys of this command."""
    run = stored(tmp_path, "advantage.type=group")  # which has no use for a critic, and was not asked about it
    out = f"out={tmp_path}/out"

    def refused(text: str, *arguments: str) -> None:
        assert command(f"run={run.path}", out, "--dry-run", *arguments) == 2
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1, err

    assert command(f"run={run.path}", out, "--dry-run") == 0
    refused("episodes earn 0 to 1, which the head cannot say", "critic.head.type=arctan", "critic.head.high=0.5")
    refused("the critic takes more blocks than the actor has", "critic.model.layers=2")
    refused(
        "the head is fitted by cross-entropy, which has no clip", "critic.head.type=hl_gauss", "critic.loss.clip=0.2"
    )
    refused("one critic does not disagree with itself; set critic.count to 2", "gae.ensemble.agreed=0.2")
    refused("gae.ensemble.agreed=0.2", "gae.ensemble.agreed=0.2")
    refused("did you mean critic.head.type?", "critic.head.typ=arctan")
    penalized = stored(tmp_path / "penalized", "kl_reward.coefficient=0.1")
    assert command(f"run={penalized.path}", out, "--dry-run") == 0
    assert "kl_reward: stored rewards are without the KL" in capsys.readouterr().out


def test_bad_input(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(code: int, text: str, *arguments: str) -> None:
        assert command(*arguments) == code
        assert text in capsys.readouterr().err.replace("\n", " ")

    out = f"out={tmp_path}/out"
    refused(2, "there is no run", "run=nowhere", out)
    refused(2, "is there and not empty", f"run={run.path}", f"out={run.path}")
    refused(2, "set critic.count=1", f"run={run.path}", out, "critic.count=2", "critic.model.layers=1")
    refused(2, "transcripts do not hold", f"run={run.path}", out, "critic.privileged=4", "critic.model.layers=1")
    refused(3, "too few to fit", f"run={run.path}", out, "held_out=0.99")
    with pytest.raises(Exception, match=r"there is no critic \(no .*critic\.json\)"):
        taking(tmp_path / "none")
    bad = run.transcript(9)
    bad.write_text('{"token": 1}\n', encoding="ascii")
    refused(3, "step_000009.jsonl:1: no row of a transcript", f"run={run.path}", out)
    bad.unlink()
