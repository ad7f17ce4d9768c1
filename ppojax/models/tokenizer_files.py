"""Tokenizers from files: a GGUF header, or a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ppojax.errors import DataError
from ppojax.models.chat import ChatTemplate
from ppojax.models.gguf import read_header
from ppojax.models.hf import read_json
from ppojax.models.tokenizer import Tokenizer
from ppojax.models.variants import choose_template

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Splitting(NamedTuple):
    """How a family cuts text before it merges bytes."""

    pattern: str | None = None  # None: GPT-2's
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token stays whole


# By GGUF's names for them.
_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "qwen2": _Splitting(_WORDS % "", nfc=True),
    "llama-bpe": _Splitting(_WORDS % "{1,3}", ignore_merges=True),
    "gpt-4o": _Splitting(_CASED_WORDS, ignore_merges=True),
}


def tokenizer_from_gguf(path: Path | str, chat_template: str | ChatTemplate = "auto") -> Tokenizer:
    """Build the tokenizer that a GGUF file describes: byte-level BPE with the splitting of one of these families.

    GPT-2, SmolLM, Qwen2 (and 3), Llama 3, GPT-4o (gpt-oss). The chat template is chosen by `choose_template`.
    Raises DataError when the file describes another kind of tokenizer or has no chat template.
    """
    header = read_header(path)
    kind, split = header.field("tokenizer.ggml.model", str), header.field("tokenizer.ggml.pre", str)
    if kind != "gpt2" or split not in _SPLITTINGS:
        raise DataError(
            f"{path}: tokenizer {kind!r} with splitting {split!r}, expected 'gpt2' with one of "
            f"{', '.join(_SPLITTINGS)}; use the model's Hugging Face folder"
        )
    tokens = header.field("tokenizer.ggml.tokens", list)
    tokenizer = _byte_level_bpe(tokens, header.field("tokenizer.ggml.merges", list), _SPLITTINGS[split])
    # GGUF token types: 3 control, 4 user-defined.
    typed = list(zip(tokens, header.field("tokenizer.ggml.token_type", list), strict=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind == 3])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == 4])
    eos = header.field("tokenizer.ggml.eos_token_id", int)
    pad = header.fields.get("tokenizer.ggml.padding_token_id", eos)
    bos = header.fields.get("tokenizer.ggml.bos_token_id", eos)
    names = {"bos_token": tokens[bos], "eos_token": tokens[eos], "pad_token": tokens[pad]}
    template = _template(chat_template, header.fields.get("tokenizer.chat_template"), tokenizer, str(path), names)
    others = (header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    ends = (eos, *others, tokenizer.token_to_id("<|endoftext|>"))
    return Tokenizer(tokenizer, template, eos_ids=[i for i in ends if i is not None], pad_id=pad)


def _byte_level_bpe(tokens: list[str], merges: list[str], splitting: _Splitting) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=splitting.ignore_merges))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    before: list[pre_tokenizers.PreTokenizer] = []
    if splitting.single_digits:
        before.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        before.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_from_hf(folder: Path | str, chat_template: str | ChatTemplate = "auto") -> Tokenizer:
    """Read `tokenizer.json` and the chat template of a Hugging Face folder.

    The template comes from `chat_template.jinja` or `tokenizer_config.json`, unless `chat_template` says otherwise
    (see `choose_template`); tokens that end a turn from the template, `tokenizer_config.json` and
    `generation_config.json`. Raises DataError when a part is missing.
    """
    folder = Path(folder)
    state = read_json(folder / "tokenizer.json")
    if not isinstance(state.get("model"), dict):
        raise DataError(f"{folder / 'tokenizer.json'}: has no model; expected a file of the tokenizers library")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    config = read_json(folder / "tokenizer_config.json")
    names = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    template = _template(chat_template, own_template(folder), tokenizer, str(folder), names)
    eos: list[int] = []
    generation = folder / "generation_config.json"
    if generation.is_file():
        stated = read_json(generation).get("eos_token_id")
        eos += stated if isinstance(stated, list) else [] if stated is None else [stated]
    ids = {name: tokenizer.token_to_id(token) for name, token in names.items() if token}
    eos += [i for i in (ids.get("eos_token"), tokenizer.token_to_id("<|endoftext|>")) if i is not None]
    return Tokenizer(tokenizer, template, eos_ids=eos, pad_id=ids.get("pad_token"))


def _token_text(token: Any) -> str:
    if isinstance(token, dict):  # a serialised AddedToken
        return token.get("content", "")
    return token or ""


def _template(
    choice: str | ChatTemplate, own: Any, tokenizer: tokenizers.Tokenizer, where: str, tokens: dict[str, str]
) -> ChatTemplate:
    if isinstance(choice, ChatTemplate):
        return choice
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    chosen = choose_template(choice, own if isinstance(own, str) else None, vocabulary, where)
    return ChatTemplate(chosen.source, ends=chosen.ends, **tokens)


def own_template(folder: Path) -> str | None:
    """The chat template that came with a folder: `chat_template.jinja`, or the one in `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template if isinstance(template, str) else None
