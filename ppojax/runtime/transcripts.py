"""Transcripts: what was said in each rollout, token by token, in a file a person can read and a viewer can colour."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from ppojax.errors import DataError
from ppojax.runtime.atomic import write_atomic
from ppojax.types import Ending, Row

log = logging.getLogger(__name__)

# C0 controls but tab and newline, DEL, C1 controls, line separators, bidirectional overrides, lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def escape_terminal(text: str) -> str:
    """Make control characters visible (`\\x1b`), so that model output cannot drive a terminal."""
    return _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def write_transcripts(
    path: Path,
    rows: Sequence[Row | None],
    decode: Callable[[list[int]], str],
    *,
    advantage_BT: np.ndarray | None = None,
    value_MBT: np.ndarray | None = None,
    ratio_BT: np.ndarray | None = None,
    mask_BT: np.ndarray | None = None,
) -> None:
    """Write one JSON object a row to `path` (`rollouts/step_NNNNNN.jsonl`).

    Row i of the arrays belongs to `rows[i]`, and to nothing where that is None; padding beyond a row's tokens is
    dropped. Fields of an object: `group`, `episode`, `segment` (the rows of an episode are linked by the last two),
    `version` (steps done to the weights that wrote it), `ending`, `error` (what kind, where it failed), `clipped` (a
    turn ran into its limit), `reward_sum`, `messages`, and, one entry a token, `token`, `text` (pieces that join to the
    whole text), `action`, `reward`, `logp_behavior`, `advantage`, `value` (a list for each critic), `ratio` and `mask`
    (of a `TokenTrace`); null where it was not given.
    `value_end` is each critic's value of the state after the last token, where the episode goes on there (truncated,
    cut) and the arrays reach that far. Numbers carry six digits.

    A file that cannot be written is a warning: no run ends for want of a transcript.
    """
    lines = []
    for i, row in enumerate(rows):
        if row is None:
            continue
        n = len(row.token)
        values = None if value_MBT is None else [_numbers(value_T[:n]) for value_T in value_MBT[:, i]]
        goes_on = row.ending in (Ending.TRUNCATED, Ending.CUT)
        end = None if value_MBT is None or not goes_on or n >= value_MBT.shape[2] else _numbers(value_MBT[:, i, n])
        record = {
            "group": row.group,
            "episode": row.episode,
            "segment": row.segment,
            "version": row.version,
            "ending": Ending(row.ending).name.lower(),
            "error": row.info.get("error") if row.ending == Ending.ERROR else None,
            "clipped": row.clipped,
            "reward_sum": _numbers(row.reward.sum(keepdims=True))[0],
            "messages": row.messages,
            "token": row.token.tolist(),
            "text": pieces(row.token.tolist(), decode),
            "action": row.action.astype(int).tolist(),
            "reward": _numbers(row.reward),
            "logp_behavior": _numbers(row.logp_behavior),
            "advantage": None if advantage_BT is None else _numbers(advantage_BT[i, :n]),
            "value": values,
            "value_end": end,
            "ratio": None if ratio_BT is None else _numbers(ratio_BT[i, :n]),
            "mask": None if mask_BT is None else mask_BT[i, :n].astype(int).tolist(),
        }
        # ASCII only: a terminal that shows the file meets no control character.
        lines.append(json.dumps(record, allow_nan=False))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(line + "\n" for line in lines))
    except OSError as error:
        log.warning("%s: the transcripts were not written: %s", path, error.strerror)


def read_transcripts(path: Path) -> list[dict[str, Any]]:
    """Read the rows that `write_transcripts` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a transcript as rows: what they were made of, but for what only the sampler knew.

    Raises DataError naming the line that cannot be read.
    """
    rows = []
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error!s:.100})") from error
    for n, line in enumerate(lines, 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{n}: no row of a transcript ({error!r:.100}); remove the line") from error
    return rows


def _row(said: dict[str, Any]) -> Row:
    def numbers(name: str) -> np.ndarray:
        return np.array([0.0 if x is None else x for x in said[name]], np.float32)

    return Row(
        token=np.array(said["token"], np.int32),
        action=np.array(said["action"], bool),
        logp_behavior=numbers("logp_behavior"),
        reward=numbers("reward"),
        group=said["group"],
        episode=said["episode"],
        segment=said["segment"],
        ending=Ending[said["ending"].upper()],
        messages=said["messages"],
        clipped=said.get("clipped", False),
    )


def pieces(token: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Split the text of a row into one piece a token; the pieces join to the whole text.

    A character whose bytes are spread over several tokens is the piece of the last of them. Each piece is decoded
    behind the tokens of the piece before it, because a decoder may treat the start of a text in its own way.
    """
    out: list[str] = []
    before = start = 0
    for end in range(1, len(token) + 1):
        known = decode(token[before:start])
        text = decode(token[before:end])
        unfinished = text.endswith(_REPLACEMENT) and end < len(token)
        out.append("" if unfinished else text[len(known) :])
        if not unfinished:
            before, start = start, end
    return out


def render_transcript(row: dict[str, Any]) -> Text:
    """Render a row of `write_transcripts` for the terminal.

    Tokens that the policy did not choose are dim; chosen ones are green where the advantage is positive, red where it
    is negative. Control characters are shown escaped and markup such as `[red]` is left as it is written.
    """
    reward = row["reward_sum"]
    head = f"group {row['group']}  episode {row['episode']}  {row['ending']}  reward "
    text = Text(head + ("none" if reward is None else f"{reward:.2f}"), style="bold")
    text.append("\n")
    advantages = row["advantage"] or [None] * len(row["token"])
    for piece, action, advantage in zip(row["text"], row["action"], advantages, strict=True):
        text.append(escape_terminal(piece), style=_style(bool(action), advantage))
    return text


def _style(action: bool, advantage: float | None) -> str:
    if not action:
        return "not bold dim"
    if not advantage:
        return "not bold"
    return "not bold green" if advantage > 0 else "not bold red"


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
