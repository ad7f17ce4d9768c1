"""A training run from its first step to its exit code: log, transcripts, evaluation, checkpoints, signals."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax
from rich.console import Console

from ppojax.config import Config
from ppojax.errors import ExitCode, PpojaxError, Preempted
from ppojax.processes.exchange import any_of
from ppojax.processes.meeting import Watch
from ppojax.runtime.age import process_age
from ppojax.runtime.checkpoint import Checkpoints
from ppojax.runtime.metrics import MetricsLog, read_metrics
from ppojax.runtime.progress import Progress, summary_table
from ppojax.runtime.rundir import RunDir
from ppojax.runtime.signals import StopSignals
from ppojax.runtime.transcripts import read_transcripts, render_transcript, write_transcripts
from ppojax.trainer.build import EVALUATE, OUTSIDE, purpose_key
from ppojax.trainer.evaluation import evaluate_greedy
from ppojax.trainer.trainer import StepOut, Trainer
from ppojax.transfer import fetch

SHOWN = 3  # transcripts printed at the end
GOES_ON = "resume=true goes on from the last checkpoint"


def train(config: Config, run: RunDir, console: Console, watch: Watch | None = None) -> None:
    """Train to `config.steps`, or until a signal or a fault; leave everything in the run directory.

    Of many processes only the first writes, but for its own part of a checkpoint; `watch` is of the others' ends.

    Raises:
        PpojaxError: with the exit code; `exit.json` says the same.
    """
    start = time.monotonic()
    writes = watch is None or watch.place.writes
    with _exit_record(run, watch) as ending:
        trainer = Trainer(config)
        with ExitStack() as stack:
            checkpoints = stack.enter_context(Checkpoints(run.checkpoints, config.checkpoint))
            # Until the old state is known to fit, nothing of an earlier attempt is touched.
            resumed = _resume(trainer, checkpoints, console)
            if writes:
                run.create(resume=config.resume is not False)
                run.write_config(config.same_everywhere())
            ending.update(checkpoints=checkpoints, trainer=trainer)
            if not resumed:
                _warm_start(trainer, console)
            board = run.tensorboard if config.run.tensorboard else None
            log = None
            if writes:
                log = stack.enter_context(MetricsLog(run.metrics, board, resume_step=trainer.number or -1))
            signals = stack.enter_context(StopSignals())
            progress = stack.enter_context(Progress(config.steps, console, start=trainer.number))
            stack.callback(trainer.close)  # while signals are still listened to
            _loop(trainer, run, checkpoints, log, signals, progress)
    if writes:
        _report(run, console, time.monotonic() - start)


def _resume(trainer: Trainer, checkpoints: Checkpoints, console: Console) -> bool:
    resume = trainer.config.resume
    if resume is False or checkpoints.latest() is None:
        return False
    state, position = checkpoints.restore(None, trainer.state(), strict=resume == "strict")
    trainer.restore(state, position)
    console.print(f"resumed after step {trainer.number}")
    return True


def _warm_start(trainer: Trainer, console: Console) -> None:
    losses = trainer.warm_start()
    if losses:
        console.print(f"warm start: {len(losses)} supervised steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def _loop(
    trainer: Trainer,
    run: RunDir,
    checkpoints: Checkpoints,
    log: MetricsLog | None,
    signals: StopSignals,
    progress: Progress,
) -> None:
    config = trainer.config
    aside = {"timing_s/start": process_age()}  # told with the next step
    if config.eval.every and trainer.number == 0:
        held_out = _evaluate(trainer, progress)
        if log is not None:
            log.log(0, held_out)
    while trainer.number < config.steps:
        progress.phase(f"step {trainer.number + 1}")
        out = trainer.step()
        done = out.step == config.steps
        if config.eval.every and (done or out.step % config.eval.every == 0):
            out.metrics.update(_evaluate(trainer, progress))
        out.metrics.update(aside)
        aside = {}
        if log is not None:
            log.log(out.step, out.metrics)
        _write_transcripts(trainer, run, out)
        progress.step(out.step, out.metrics)
        stop = any_of(signals.should_stop())
        if done or stop or config.checkpoint.due(out.step):
            begin = time.perf_counter()
            save = checkpoints.save_last if done or stop else checkpoints.save
            save(out.step, trainer.state(), trainer.position())
            # This step's row is written before its checkpoint is, so that a kill spares it.
            aside = {"ckpt/step": float(out.step), "ckpt/blocked_s": time.perf_counter() - begin}
        if stop and not done:
            who = signals.received() or "a signal to another process"
            raise Preempted(f"stopped by {who} after step {out.step}, saved: resume=true goes on")


def _evaluate(trainer: Trainer, progress: Progress) -> dict[str, float]:
    progress.phase("evaluating")
    config, parts = trainer.config, trainer.parts
    trainer.player.settle()
    key, start = purpose_key(config.seed, OUTSIDE, EVALUATE), time.perf_counter()
    metrics, _ = evaluate_greedy(parts.collector, trainer.sampler_policy(), parts.eval_tasks, key)
    progress.note(
        f"greedy success on {len(parts.eval_tasks)} held-out tasks: {metrics['val/success']:.3f} "
        f"[{metrics['val/success_low']:.3f}, {metrics['val/success_high']:.3f}]"
    )
    return metrics | {"timing_s/eval": time.perf_counter() - start}


def _write_transcripts(trainer: Trainer, run: RunDir, out: StepOut) -> None:
    advantage_BT, value_MBT = fetch((out.batch.advantage_BT, out.batch.experience.value_MBT))
    if jax.process_index() > 0:
        return
    write_transcripts(
        run.transcript(out.step),
        out.rows,
        trainer.parts.tokenizer.decode,
        advantage_BT=advantage_BT,
        value_MBT=value_MBT,
        ratio_BT=None if out.trace is None else out.trace.ratio_BT,
        mask_BT=None if out.trace is None else out.trace.mask_BT,
    )


@contextmanager
def _exit_record(run: RunDir, watch: Watch | None) -> Iterator[dict]:
    """Write `exit.json` whatever happens, once there is a run directory."""
    ending: dict = {}
    code: int = ExitCode.DONE
    reason, hint = "done", f"python -m ppojax.evaluate run={run.path}"

    def record(code: int, reason: str, hint: str = GOES_ON) -> None:
        if ending and (watch is None or watch.place.writes):
            run.write_exit(code, reason, ending["trainer"].number, ending["checkpoints"].latest(), hint)

    if watch is not None:
        watch.on_end = record
    try:
        yield ending
    except PpojaxError as error:
        code, reason, hint = error.exit_code, str(error), GOES_ON
        raise
    except KeyboardInterrupt:
        code, reason, hint = ExitCode.INTERRUPTED, "interrupted", f"{GOES_ON}, if there is one"
        raise
    except BaseException as error:
        other = None if watch is None else watch.cause()
        if other is not None:
            code, reason, hint = other.exit_code, str(other), GOES_ON
            raise other from error
        code, reason, hint = ExitCode.BUG, repr(error), "a bug in ppojax or in the environment: see the trace"
        raise
    finally:
        record(code, reason, hint)


def _report(run: RunDir, console: Console, seconds: float) -> None:
    """Print first against last step, a few transcripts, and where everything is."""
    rows = [row for row in read_metrics(run.metrics) if "reward/mean" in row]
    evaluated = [row for row in read_metrics(run.metrics) if "val/success" in row]
    if not rows:
        return
    names = ("reward/mean", "reward/success", "critic/vf_explained_var", "actor/entropy", "sampling/logp_diff_max")
    extra = {"wall-clock": f"{seconds:.0f} s", "steps": len(rows)}
    if evaluated:
        extra["greedy success, held out"] = f"{evaluated[0]['val/success']:.3f} -> {evaluated[-1]['val/success']:.3f}"
    console.print(summary_table(rows[0], rows[-1], extra, names))
    last = run.transcript(int(rows[-1]["step"] or 0))
    for row in read_transcripts(last)[:SHOWN] if last.exists() else []:
        console.print(render_transcript(row))
    console.print(f"\nmetrics      {run.metrics}\ntranscripts  {run.rollouts}\ncheckpoints  {run.checkpoints}")
    console.print(f"tensorboard  tensorboard --logdir {run.tensorboard}")
    console.print(f"evaluate     python -m ppojax.evaluate run={run.path}")
    console.print(f"look         python -m ppojax.view run={run.path}")
