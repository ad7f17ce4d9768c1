"""A critic fitted to the stored rollouts of a run, before it is asked to help a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ppojax.advantages import GAE
from ppojax.advantages.chain import Chains
from ppojax.config import Config
from ppojax.errors import DataError
from ppojax.experience.batch import make_batch
from ppojax.experience.minibatch import move_rows
from ppojax.experience.pack import bucketed, pack
from ppojax.experience.reward_scaling import scale
from ppojax.experience.score import Scorers, score
from ppojax.experience.summary import to_go
from ppojax.models.critic_files import write_critic
from ppojax.models.pretrained import Loaded
from ppojax.runtime.rundir import RunDir
from ppojax.runtime.transcripts import read_rows
from ppojax.statistics import explained_variance
from ppojax.trainer.build import build_critic
from ppojax.trainer.held_out import restored
from ppojax.types import Batch, Ending, Experience, Layout, Row, episodes_of
from ppojax.update.critic import critic_step
from ppojax.update.offload import wake

PARTS = 5  # of a row, for which the explained variance is told apart
Episode = list[Row]


class Explained(NamedTuple):
    """1 - Var[G - V] / Var[G] on held-out rows, in all and by place in the row; NaN where returns do not vary."""

    whole: float
    by_part: tuple[float, ...]


@dataclass(frozen=True)
class Fitted:
    """What a fit did."""

    rows: int
    held_out: int
    losses: list[float]
    before: Explained
    after: Explained


def fit_run(
    played: Config,
    config: Config,
    run: RunDir,
    out: Path,
    *,
    checkpoint: int | None,
    passes: int,
    share: float,
    seed: int,
    told: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> Fitted:
    """Fit a critic to all rollouts that a run has stored, and write it.

    Args:
        played: the config of the run.
        config: the same with the critic that is to be fitted, and the GAE that makes its targets.
        run: the run.
        out: the folder to write.
        checkpoint: step of the policy that a critic may be cut from; None for the newest.
        passes: over the rollouts.
        share: of the prompts that is only looked at.
        seed: of who is held out, and of the order.
        told: is called after each step with its number, how many there are, and the loss.

    Raises:
        DataError: there is no checkpoint, there are no rollouts, or too few.
        ConfigError, CannotWriteError: as `write_critic`.
    """
    train, kept = held_out(stored_episodes(run), share, seed)
    trainer = restored(played, run, checkpoint)
    actor = Loaded(trainer.parts.actor, trainer.policy(), trainer.parts.tokenizer)
    fit = _Fit(config, actor, trainer.parts.mesh)
    before = fit.explained(kept)
    losses, rng = [], np.random.default_rng(seed)
    batches = [batch for _ in range(passes) for batch in fit.dealt(train, rng)]
    for n, rows in enumerate(batches, 1):
        losses.append(fit.step(rows))
        told(n, len(batches), losses[-1])
    fitted = Fitted(_count(train), _count(kept), losses, before, fit.explained(kept))
    about = {"run": str(run.path), "step": trainer.number, "explained_variance": _finite(fitted.after)}
    write_critic(out, fit.model, fit.state.params, actor.tokenizer.fingerprint(), about)
    return fitted


def stored_episodes(run: RunDir) -> list[Episode]:
    """The rows of every episode that the run's transcripts hold and that did not fail; prompts are numbered anew.

    Raises DataError where there are none.
    """
    episodes: list[Episode] = []
    groups = numbers = 0
    for path in sorted(run.rollouts.glob("step_*.jsonl")):
        rows = read_rows(path)
        for found in episodes_of(rows):
            if found[-1].ending != Ending.ERROR:
                moved = [replace(r, group=r.group + groups, episode=r.episode + numbers) for r in found]
                episodes.append(moved)
        groups += 1 + max((row.group for row in rows), default=0)
        numbers += 1 + max((row.episode for row in rows), default=0)
    if not episodes:
        raise DataError(f"{run.rollouts}: there are no rollouts; a run writes them with every step")
    return episodes


class _Fit:
    """A critic and its optimizer."""

    def __init__(self, config: Config, actor: Loaded, mesh: jax.sharding.Mesh) -> None:
        self._config, self._mesh, self._actor = config, mesh, actor
        self.model, self._base, state = build_critic(config, actor, mesh)
        self.state = wake(state)

    def dealt(self, episodes: Sequence[Episode], rng: np.random.Generator | None = None) -> Iterator[list[Row]]:
        """Deal episodes out as batches, shuffled where there is randomness; the rows of one stay together."""
        rows: list[Row] = []
        order = range(len(episodes)) if rng is None else rng.permutation(len(episodes)).tolist()
        for n in order:
            if rows and len(rows) + len(episodes[n]) > self._config.rollout.rows:
                yield rows
                rows = []
            rows = [*rows, *episodes[n]]
        if rows:
            yield rows

    def step(self, rows: list[Row]) -> float:
        """Take one optimizer step on these rows; return the loss before it."""
        config, mesh = self._config, self.model.mesh
        assert mesh is not None
        batch = self._batch(rows)
        self.state, metrics = critic_step(
            self.state,
            batch if mesh == self._mesh else move_rows(batch, mesh=mesh),
            model=self.model,
            config=config.critic,
            layout=Layout(),
            microbatch_rows=config.update.microbatch_rows,
            mesh=mesh,
            frozen=self._base,
        )
        return float(metrics["critic/loss"])

    def explained(self, episodes: Sequence[Episode]) -> Explained:
        """Compare values with Monte-Carlo returns."""
        assert isinstance(self._config.advantage, GAE)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for rows in self.dealt(episodes):
            e = jax.device_get(self._scored(rows))
            return_BT = to_go(e.reward_BT, e.action_BT, self._config.advantage.gamma, chains=Chains.of(e))
            order_BT = np.cumsum(e.action_BT, axis=1) - 1
            part_BT = order_BT * PARTS // np.maximum(e.action_BT.sum(1, keepdims=True), 1)
            found.append((return_BT[e.action_BT], e.value_MBT[0][e.action_BT], part_BT[e.action_BT]))
        returns, values, parts = (np.concatenate(column).astype(np.float64) for column in zip(*found, strict=True))
        return Explained(
            explained_variance(returns, values),
            tuple(explained_variance(returns[parts == p], values[parts == p]) for p in range(PARTS)),
        )

    def _batch(self, rows: list[Row]) -> Batch:
        return make_batch(self._scored(rows), estimator=self._config.advantage)

    def _scored(self, rows: list[Row]) -> Experience:
        config, settings = self._config, self._config.rollout
        experience = pack(
            rows,
            batch=bucketed(len(rows), settings.rows, steps=2),
            bucket=settings.bucket,
            actions=config.env.max_turns * settings.max_turn_tokens + settings.written,
            mesh=self._mesh,
        )
        experience = scale(experience, config.reward_scaling, bootstraps=config.advantage.bootstraps)
        return score(
            Scorers(critic=self.state.params),
            experience,
            actor=self._actor.model,
            critic=self.model,
            layout=Layout(),
            temperature=settings.temperature,
            microbatch_rows=config.update.microbatch_rows,
        )


def held_out(episodes: list[Episode], share: float, seed: int) -> tuple[list[Episode], list[Episode]]:
    """Hold out a share of the prompts, each with all the episodes that were ever played of it."""
    prompts = sorted({_prompt(rows) for rows in episodes})
    count = max(round(share * len(prompts)), 1)
    if count >= len(prompts):
        raise DataError(f"{len(prompts)} prompts are stored, too few to fit a critic and to look at it on others")
    order = np.random.default_rng((seed, 1)).permutation(len(prompts))
    kept = {prompts[n] for n in order[:count]}
    return [e for e in episodes if _prompt(e) not in kept], [e for e in episodes if _prompt(e) in kept]


def _prompt(rows: Episode) -> tuple[int, ...]:
    first = rows[0]
    return tuple(first.token[: int(first.action.argmax())].tolist())


def _finite(explained: Explained) -> dict[str, float | list[float | None] | None]:
    def told(x: float) -> float | None:
        return round(x, 6) if np.isfinite(x) else None

    return {"whole": told(explained.whole), "by_part": [told(x) for x in explained.by_part]}


def _count(episodes: list[Episode]) -> int:
    return sum(map(len, episodes))
