"""Tokenizers from files: a GGUF header, or a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ppojax.errors import DataError
from ppojax.models.chat import ChatTemplate
from ppojax.models.gguf import read_header
from ppojax.models.hf import read_json
from ppojax.models.tokenizer import Tokenizer


def tokenizer_from_gguf(path: Path | str) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes (byte-level BPE with SmolLM's splitting of digits).

    Raises DataError when the file describes another kind of tokenizer or has no chat template.
    """
    header = read_header(path)
    kind = (header.field("tokenizer.ggml.model", str), header.field("tokenizer.ggml.pre", str))
    if kind != ("gpt2", "smollm"):
        raise DataError(f"{path}: tokenizer {kind}, expected ('gpt2', 'smollm'); use the model's Hugging Face folder")
    tokens = header.field("tokenizer.ggml.tokens", list)
    kinds = header.field("tokenizer.ggml.token_type", list)
    merges = [tuple(m.split(" ")) for m in header.field("tokenizer.ggml.merges", list)]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # GGUF token types: 3 control, 4 user-defined.
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == 3]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == 4])
    eos = header.field("tokenizer.ggml.eos_token_id", int)
    pad = header.fields.get("tokenizer.ggml.padding_token_id", eos)
    bos = header.fields.get("tokenizer.ggml.bos_token_id", eos)
    template = ChatTemplate(
        header.field("tokenizer.chat_template", str),
        bos_token=tokens[bos],
        eos_token=tokens[eos],
        pad_token=tokens[pad],
    )
    end_of_text = [i for i, t in enumerate(tokens[:64]) if t == "<|endoftext|>"]
    return Tokenizer(tokenizer, template, eos_ids=(eos, *end_of_text), pad_id=pad)


def tokenizer_from_hf(folder: Path | str) -> Tokenizer:
    """Read `tokenizer.json` and the chat template of a Hugging Face folder.

    The template comes from `chat_template.jinja` or `tokenizer_config.json`; tokens that end a turn from the
    template, `tokenizer_config.json` and `generation_config.json`. Raises DataError when a part is missing.
    """
    folder = Path(folder)
    state = read_json(folder / "tokenizer.json")
    if not isinstance(state.get("model"), dict):
        raise DataError(f"{folder / 'tokenizer.json'}: has no model; expected a file of the tokenizers library")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    config = read_json(folder / "tokenizer_config.json")
    names = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    template = ChatTemplate(_hf_template(folder, config), **names)
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


def _hf_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not isinstance(template, str):
        raise DataError(f"{folder}: no chat_template.jinja and no chat_template in tokenizer_config.json; add one")
    return template
