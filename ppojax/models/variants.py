"""Which chat template a tokenizer gets: the model's own, a training variant of it, or a file.

A training variant writes the same text as the model's own template for a single turn, and keeps every turn as it was
written when more follow. Models are told apart by their own template and by their tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ppojax.errors import DataError

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "templates"


class Variant(NamedTuple):
    """A training variant: its file, the tokens that it writes, those of them that end a turn, and the templates
    (sha256, without white space around) that it stands in for."""

    name: str
    file: str
    tokens: tuple[str, ...]
    ends: tuple[str, ...]
    replaces: tuple[str, ...]


class Chosen(NamedTuple):
    """The source of a chat template, and the tokens that are known to end a turn in it."""

    source: str
    ends: tuple[str, ...] = ()


_VARIANTS = (
    Variant(
        "Qwen3",
        "qwen3.jinja",
        ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "<think>", "</think>"),
        ("<|im_end|>",),
        ("87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5",),
    ),
    Variant(
        "gpt-oss",
        "gpt_oss.jinja",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        ("<|return|>", "<|call|>"),
        ("a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146",),
    ),
)


def choose_template(choice: str, own: str | None, vocabulary: Collection[str], where: str) -> Chosen:
    """Choose a chat template.

    Args:
        choice: `auto` (the model's own, or its training variant where the own is known to rewrite earlier turns, or
            is not there), `training` (the training variant), or the path of a template.
        own: the template that came with the tokenizer.
        vocabulary: the tokenizer's tokens.
        where: the tokenizer's file or folder, for errors.

    Raises:
        DataError: there is no such file, no training variant for this model, or no template at all.
    """
    if choice not in ("auto", "training"):
        return Chosen(_read(Path(choice).expanduser()))
    fitting = [v for v in _VARIANTS if all(token in vocabulary for token in v.tokens)]
    if choice == "auto":
        if own is None and not fitting:
            raise DataError(
                f"{where}: no chat_template.jinja and no chat_template in tokenizer_config.json, expected a chat "
                "template; add one, or set model.chat_template to the path of one"
            )
        if own is not None and not any(_stands_in(v, own) for v in fitting):
            return Chosen(own)
    if not fitting:
        raise DataError(
            f"{where}: no training variant of the chat template for these tokens, expected a tokenizer of "
            f"{' or '.join(v.name for v in _VARIANTS)}; set model.chat_template to the path of one"
        )
    variant = fitting[0]
    source = _source(variant)
    if own != source:
        reason = "there is no chat template" if own is None else "the model's chat template rewrites earlier turns"
        log.warning("%s: %s; using the training variant for %s", where, reason, variant.name)
    return Chosen(source, variant.ends)


def _source(variant: Variant) -> str:
    return (_FOLDER / variant.file).read_text(encoding="utf-8")


def _stands_in(variant: Variant, own: str) -> bool:
    # Harmony is one format in many revisions of its template; all of them drop the analysis of earlier turns.
    harmony = "<|channel|>" in variant.tokens and "<|channel|>analysis<|message|>" in own
    return harmony or own == _source(variant) or hashlib.sha256(own.strip().encode()).hexdigest() in variant.replaces


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.chat_template: {path} cannot be read ({error.__class__.__name__}); expected auto, training, "
            "or the path of a template"
        ) from error
