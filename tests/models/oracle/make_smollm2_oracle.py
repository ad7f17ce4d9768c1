"""Write smollm2_oracle.json: what transformers computes for SmolLM2-135M-Instruct from the GGUF file.

    python -m venv /tmp/oracle
    /tmp/oracle/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0
    /tmp/oracle/bin/pip install --no-deps accelerate==1.15.0
    /tmp/oracle/bin/python tests/models/oracle/make_smollm2_oracle.py PATH_OF_THE_GGUF

Float32 on the CPU, torch with one thread.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
)
PASSAGE = (
    "A gradient tells how a function changes when its arguments change a little. To make the function smaller, "
    "one walks a short way against it, looks again, and repeats until nothing changes any more, 12 or 345 times."
)
CONVERSATIONS = (
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12+34?"}],
    [{"role": "user", "content": "caf\u00e9 \u4f60\u597d"}],
    [
        {"role": "system", "content": "Use the calculator."},
        {"role": "user", "content": "What is 12+34?"},
        {"role": "assistant", "content": "<calc>12+34</calc>"},
        {"role": "tool", "content": "46"},
    ],
)
GREEDY = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about a fox and a river."}],
    [{"role": "user", "content": "def double(x):\n    # complete this function"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three fruits."}],
    [
        {"role": "user", "content": "Say \u00ab caf\u00e9 \u00bb."},
        {"role": "assistant", "content": "caf\u00e9"},
        {"role": "user", "content": "Again, and count to 5."},
    ],
)
# No numerals after a space but ASCII ones: transformers' GGUF reader leaves out SmolLM's splitting of digits, which the
# vocabulary hides for ASCII digits only.
STRINGS = (
    "",
    "Hello, world!",
    "123 + 456 = 579",
    "<calc>12+34</calc>",
    "line one\nline two\n\n\tindented",
    "   leading and   inner   spaces ",
    "caf\u00e9 na\u00efve \u00fcber",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "don't I'll we've",
    "\u0663\u0664 3.14e-10",
    "x\r\ny\u00a0z\u2028",
)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def chat(messages: list[dict[str, str]]) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(model.config.vocab_size, generator=generator)[:200].sort().values
    prompts = []
    for text in PROMPTS:
        ids = torch.tensor([encode(text)])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        prompts.append({"ids": ids[0].tolist(), "logits": logits[some].tolist(), "lse": logits.logsumexp(0).item()})

    passage = torch.tensor([encode(PASSAGE)[:41]])
    with torch.no_grad():
        logp = model(passage).logits[0, :-1].log_softmax(-1).gather(-1, passage[0, 1:, None])[:, 0]

    greedy = []
    for messages in GREEDY:
        start = torch.tensor([chat(messages)])
        with torch.no_grad():
            whole = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=32)
        ids = whole[0, start.shape[1] :].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        greedy.append({"messages": messages, "prompt": start[0].tolist(), "continuation": ids, "text": text})

    oracle = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__, "weights": path.name},
        "logit_ids": some.tolist(),
        "prompts": prompts,
        "passage": {"ids": passage[0].tolist(), "logp": logp.tolist()},
        "greedy": greedy,
        "conversations": [{"messages": m, "ids": chat(m)} for m in CONVERSATIONS],
        "strings": [{"text": s, "ids": encode(s)} for s in STRINGS],
    }
    target = Path(__file__).with_name("smollm2_oracle.json")
    target.write_text(json.dumps(oracle, indent=None, separators=(",", ":")) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
