"""Text to token ids and back, and chat messages to ids without letting their contents speak as the template.

Hugging Face encodes a rendered conversation as one string, so a tool result that says `<|im_end|>` ends the turn.
Here such texts are broken up before the template sees them, and put together again once the template's own markers
have been cut out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ppojax.errors import DataError
from ppojax.models.chat import ChatTemplate
from ppojax.models.gguf import read_header
from ppojax.models.llama import read_json
from ppojax.types import Messages

ROLES = ("system", "user", "assistant", "tool")
_CHAR_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_BREAK = "\ue000"  # a private-use character, repeated more often than it occurs in the messages
_DUMMY = "ppojax-assistant-turn"
_PROBE = "The 3 quick\n\n  foxes: caf\u00e9 \u4f60\u597d \U0001f98a <calc>12+34</calc>\t{}"


class Tokenizer:
    """A `tokenizers.Tokenizer` with its chat template.

    Attributes:
        vocab_size: one more than the largest id.
        eos_ids: tokens that end a turn; the first is the one that the template writes.
        pad_id: fills up rows; never trained on.

    Raises DataError when the template is not prefix-preserving: appending messages to a conversation has to leave
    everything up to its last assistant turn as it was, or an append-only row could not hold it.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        template: ChatTemplate,
        *,
        eos_ids: Sequence[int],
        pad_id: int | None = None,
    ) -> None:
        self._full = tokenizer
        self._plain = _without_added_tokens(tokenizer)
        by_character = isinstance(self._plain.model, models.WordLevel)
        self._alphabet = frozenset(self._plain.get_vocab()) if by_character else None
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i: t for i, t in added.items() if t.special}
        # Runs of spaces and single characters are added for compression and mark nothing.
        words = {i: t for i, t in added.items() if not t.special and len(t.content.strip()) > 1}
        self._all_markers = _Markers(self._special | words)
        self._special_markers = _Markers(self._special)
        self._word_markers = _Markers(words)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._skip_closing, end_of_turn = self._check_template(eos_ids)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*end_of_turn, *eos_ids]))
        if not self.eos_ids:
            raise DataError("tokenizer: no token ends a turn; expected eos_token in tokenizer_config.json")
        self.pad_id: int = self.eos_ids[0] if pad_id is None else pad_id

    def encode(self, text: str) -> list[int]:
        """Encode text as the model would write it: special tokens in it are spelled out, never parsed."""
        return self._cut(text, self._word_markers, "")

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._full.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        """List the bytes of each id; empty for special tokens and unused ids."""
        spell = _speller(json.loads(self._full.to_str())["decoder"])
        added = self._full.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, i in self._full.get_vocab(with_added_tokens=True).items():
            if i not in self._special:
                table[i] = token.encode() if i in added else spell(token)
        return table

    def render(
        self, messages: Messages, tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = True
    ) -> list[int]:
        """Render messages to ids through the chat template.

        Contents never become special tokens; markers that are not special (such as `<tool_call>`) count only in
        assistant messages. Raises DataError when the template cannot render the messages.
        """
        broken, broken_tools, mark = self._break_up(messages, tools)
        text = self._template.render(broken, broken_tools, generation=add_generation_prompt)
        return self._cut(text, self._all_markers, mark)

    def suffix(self, messages: Messages, *, ended: bool) -> list[int]:
        """Give the ids that follow an assistant turn: its closing, the new messages and the next turn's header.

        Args:
            messages: what came after the turn.
            ended: the turn ended with one of `eos_ids`, which is in the row already.
        """
        broken, _, mark = self._break_up(messages, ())
        ids = self._cut(self._after_dummy(broken, generation=True), self._all_markers, mark)
        return ids[self._skip_closing :] if ended else ids

    def fingerprint(self) -> str:
        """Hash what decides over ids: the vocabulary, the template, and how a probe text is encoded (sha256)."""
        vocabulary = sorted((i, t) for t, i in self._full.get_vocab(with_added_tokens=True).items())
        parts = [vocabulary, sorted(self._special), self.eos_ids, self.pad_id, self._template.source, self._probe]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _probe(self) -> list[int]:
        return self.encode("".join(c for c in _PROBE if self._alphabet is None or c in self._alphabet))

    def _cut(self, text: str, markers: _Markers, mark: str) -> list[int]:
        """Encode text with markers as their ids and everything between them as plain text."""
        ids: list[int] = []
        for piece in markers.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            elif plain := (piece.replace(mark, "") if mark else piece):
                ids += self._encode_plain(plain)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if self._alphabet is not None and (unknown := sorted(set(text) - self._alphabet)):
            raise DataError(
                f"tokenizer: character {unknown[0]!a} of {text[:40]!a} is not in the alphabet; "
                "add it to the alphabet of the character tokenizer"
            )
        return self._plain.encode(text, add_special_tokens=False).ids

    def _break_up(
        self, messages: Messages, tools: Sequence[dict[str, Any]]
    ) -> tuple[Messages, list[dict[str, Any]], str]:
        """Break up every marker inside the messages' strings with a text that occurs nowhere in them."""
        runs = (len(run) for s in _strings([*messages, *tools]) for run in re.findall(f"{_BREAK}+", s))
        mark = _BREAK * (max(runs, default=0) + 1)

        def broken(value: Any, markers: _Markers) -> Any:
            if isinstance(value, str):
                return markers.break_up(value, mark)
            if isinstance(value, dict):
                return {k: broken(v, markers) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [broken(v, markers) for v in value]
            return value

        written = [
            broken(m, self._special_markers if m.get("role") == "assistant" else self._all_markers) for m in messages
        ]
        return written, [broken(tool, self._all_markers) for tool in tools], mark

    def _after_dummy(self, messages: Messages, *, generation: bool) -> str:
        start = [{"role": "user", "content": "."}, {"role": "assistant", "content": _DUMMY}]
        _, found, rest = self._template.render([*start, *messages], generation=generation).partition(_DUMMY)
        if not found:
            raise DataError("chat template: drops the content of an assistant turn; use a template that keeps it")
        return rest

    def _check_template(self, eos_ids: Sequence[int]) -> tuple[int, list[int]]:
        """Check that rows can be append-only; count the closing ids up to the end of turn, and name that token."""
        user = {"role": "user", "content": "."}
        start = self._template.render([user], generation=True)
        longer = self._template.render([user, {"role": "assistant", "content": _DUMMY}, user], generation=True)
        closing = self._after_dummy([], generation=False)
        if not longer.startswith(start) or not self._after_dummy([user], generation=True).startswith(closing):
            raise DataError(
                "chat template: not prefix-preserving (a later message changes how earlier ones are written); "
                "use a training variant of the template"
            )
        ids = self._cut(closing, self._all_markers, "")
        known = [n for n, i in enumerate(ids) if i in eos_ids] or [n for n, i in enumerate(ids) if i in self._special]
        return (known[0] + 1, [ids[known[0]]]) if known else (0, [])


class _Markers:
    """Added tokens, as a pattern over text."""

    def __init__(self, tokens: dict[int, AddedToken]) -> None:
        ordered = sorted(tokens.items(), key=lambda item: -len(item[1].content))
        self._ids = [i for i, _ in ordered]
        # One group a token; those that swallow spaces do so outside of it.
        forms = [
            (r"\s*" if t.lstrip else "") + f"({re.escape(t.content)})" + (r"\s*" if t.rstrip else "")
            for _, t in ordered
        ]
        self._pattern = re.compile("|".join(forms) or r"(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        """Cut text at its markers; texts between them and ids of markers alternate."""
        at = 0
        for match in self._pattern.finditer(text):
            yield text[at : match.start()]
            assert match.lastindex is not None
            yield self._ids[match.lastindex - 1]
            at = match.end()
        yield text[at:]

    def break_up(self, text: str, mark: str) -> str:
        """Put a mark behind each character of each marker."""
        return self._pattern.sub(lambda m: "".join(c + mark for c in m.group()), text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _without_added_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    state = json.loads(tokenizer.to_str())
    state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _speller(decoder: dict[str, Any] | None) -> Any:
    """How the vocabulary spells bytes, by the decoder: byte-level BPE, SentencePiece with bytes, or plain text."""
    kinds = {d["type"] for d in (decoder or {}).get("decoders", [decoder or {"type": ""}])}
    if "ByteLevel" in kinds:
        table = _byte_level_alphabet()
        return lambda token: bytes(table[c] for c in token)
    if "ByteFallback" in kinds:
        byte = re.compile(r"<0x([0-9A-F]{2})>")
        return lambda token: (
            bytes.fromhex(m[1]) if (m := byte.fullmatch(token)) else token.replace("\u2581", " ").encode()
        )
    return str.encode


def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE spells the 256 bytes (Radford et al. 2019, the GPT-2 code)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def char_tokenizer(alphabet: Iterable[str]) -> Tokenizer:
    """Make a tokenizer with one id a character, for models from scratch.

    A turn is one header token (`<|user|>` ...), its characters and `<|im_end|>`. Encoding a character outside of the
    alphabet raises DataError.
    """
    specials = ["<|pad|>", "<|im_end|>", *(f"<|{role}|>" for role in ROLES)]
    vocabulary = {token: i for i, token in enumerate([*specials, *dict.fromkeys(alphabet)])}
    if any(len(token) != 1 for token in list(vocabulary)[len(specials) :]):
        raise DataError("char_tokenizer: the alphabet holds a text that is not one character; give single characters")
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return Tokenizer(tokenizer, ChatTemplate(_CHAR_TEMPLATE), eos_ids=(1,), pad_id=0)


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
