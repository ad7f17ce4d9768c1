"""Text to token ids and back, and chat messages to ids without letting their contents speak as the template.

Hugging Face encodes a rendered conversation as one string, so a tool result that says `<|im_end|>` ends the turn.
Here such texts are broken up before the template sees them, and put together again once the template's own markers
have been cut out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ppojax.errors import DataError
from ppojax.models.chat import ChatTemplate
from ppojax.models.markers import CHANNELS, Markers, strings_of
from ppojax.models.prefixes import check_prefixes
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
_KEPT, _KEPT_CHARS = 1024, 8192  # conversations whose ids are kept, and how long they may be as JSON
_PROBE = "The 3 quick\n\n  foxes: caf\u00e9 \u4f60\u597d \U0001f98a <calc>12+34</calc>\t{}"


class Tokenizer:
    """A `tokenizers.Tokenizer` with its chat template.

    Attributes:
        vocab_size: one more than the largest id.
        eos_ids: tokens that end a turn; the first is the one that the template writes.
        pad_id: fills up rows; never trained on.
        template: the chat template.

    Raises DataError when the template is not prefix-preserving: appending messages to a conversation has to leave
    everything up to its last assistant turn as it was, or an append-only row could not hold it (`check_prefixes`).
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
        self.template = template
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i: t for i, t in added.items() if t.special}
        # Runs of spaces and single characters are added for compression and mark nothing.
        words = {i: t for i, t in added.items() if not t.special and len(t.content.strip()) > 1}
        self._all_markers = Markers(self._special | words)
        self._special_markers = Markers(self._special)
        channels = CHANNELS if "<|channel|>" in template.source else ()
        shown = {i: t for i, t in self._special.items() if t.content in channels}
        self._hidden = self._special.keys() - shown.keys()
        self._written_markers = Markers(words | shown)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        eos_ids = [*eos_ids, *(i for t in template.ends if (i := tokenizer.token_to_id(t)) is not None)]
        self._skip_closing, end_of_turn = self._check_template(eos_ids)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*end_of_turn, *eos_ids]))
        if not self.eos_ids:
            raise DataError("tokenizer: no token ends a turn; expected eos_token in tokenizer_config.json")
        self.pad_id: int = self.eos_ids[0] if pad_id is None else pad_id
        # The episodes of a group begin alike, and a template costs more than all else that the host does for a row.
        self._kept = lru_cache(_KEPT)(lambda text: tuple(self._write(*json.loads(text))))

    def encode(self, text: str) -> list[int]:
        """Encode text as the model would write it: what `decode` shows becomes a marker, other special tokens in it are
        spelled out."""
        return self._cut(text, self._written_markers, "")

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; bytes that are not UTF-8 give U+FFFD, special tokens nothing, but for the marks of
        channels where the chat template has them."""
        return self._full.decode([i for i in ids if i not in self._hidden], skip_special_tokens=False)

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
        return self._ids(messages, tools, add_generation_prompt, after_turn=False)

    def suffix(self, messages: Messages, *, ended: bool) -> list[int]:
        """Give the ids that follow an assistant turn: its closing, the new messages and the next turn's header.

        Args:
            messages: what came after the turn.
            ended: the turn ended with one of `eos_ids`, which is in the row already.
        """
        ids = self._ids(messages, (), generation=True, after_turn=True)
        return ids[self._skip_closing :] if ended else ids

    def at_least(self, messages: Messages) -> int:
        """Bound the tokens of messages from below: their characters over those of the longest token."""
        contents = (m.get("content") for m in messages)
        return sum(len(text) for text in contents if isinstance(text, str)) // self.longest

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._full.get_vocab(with_added_tokens=True)))

    def fingerprint(self) -> str:
        """Hash what decides over ids: the vocabulary, the template, and how a probe text is encoded (sha256)."""
        vocabulary = sorted((i, t) for t, i in self._full.get_vocab(with_added_tokens=True).items())
        parts = [vocabulary, sorted(self._special), self.eos_ids, self.pad_id, self.template.source, self._probe]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer as a Hugging Face folder: what `tokenizer_from_hf` and transformers read.

        `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, and `generation_config.json` with the tokens
        that end a turn. The template is the one that rows are written with, be it the model's own or a training
        variant. Raises DataError when the folder cannot be written.
        """
        folder = Path(folder)
        eos, pad = (self._full.id_to_token(i) for i in (self.eos_ids[0], self.pad_id))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self.template.bos_token or None,
            "eos_token": eos,
            "pad_token": pad,
        }
        generation = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        files = {
            "tokenizer.json": self._full.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            "chat_template.jinja": self.template.source,
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error

    def _ids(
        self, messages: Messages, tools: Sequence[dict[str, Any]], generation: bool, after_turn: bool
    ) -> list[int]:
        """What the template makes of a conversation: once, where it is JSON and not long."""
        conversation = (list(messages), list(tools), generation, after_turn)
        try:
            text = json.dumps(conversation)
        except (TypeError, ValueError, RecursionError):  # the template may know what to do with it
            return self._write(*conversation)
        return self._write(*conversation) if len(text) > _KEPT_CHARS else list(self._kept(text))

    def _write(
        self, messages: Messages, tools: Sequence[dict[str, Any]], generation: bool, after_turn: bool
    ) -> list[int]:
        broken, broken_tools, mark = self._break_up(messages, tools)
        if after_turn:
            text = self._after_dummy(broken, generation=generation)
        else:
            text = self.template.render(broken, broken_tools, generation=generation)
        return self._cut(text, self._all_markers, mark)

    @cached_property
    def _probe(self) -> list[int]:
        return self.encode("".join(c for c in _PROBE if self._alphabet is None or c in self._alphabet))

    def _cut(self, text: str, markers: Markers, mark: str) -> list[int]:
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
        runs = (len(run) for s in strings_of([*messages, *tools]) for run in re.findall(f"{_BREAK}+", s))
        mark = _BREAK * (max(runs, default=0) + 1)

        def broken(value: Any, markers: Markers) -> Any:
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
        _, found, rest = self.template.render([*start, *messages], generation=generation).partition(_DUMMY)
        if not found:
            raise DataError("chat template: drops the content of an assistant turn; use a template that keeps it")
        return rest

    def _check_template(self, eos_ids: Sequence[int]) -> tuple[int, list[int]]:
        """Check that rows can be append-only; count the closing ids up to the end of turn, and name that token."""
        check_prefixes(self.template)
        closing = self._after_dummy([], generation=False)
        ids = self._cut(closing, self._all_markers, "")
        known = [n for n, i in enumerate(ids) if i in eos_ids] or [n for n, i in enumerate(ids) if i in self._special]
        return (known[0] + 1, [ids[known[0]]]) if known else (0, [])


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
