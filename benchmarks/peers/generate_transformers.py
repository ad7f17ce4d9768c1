"""transformers' `generate`, told by lines of JSON: {"batch", "prompt", "new"} in, {"seconds"} out.

Run by benchmarks/decode.py in an environment of its own, with torch and transformers.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers


def main() -> None:
    """Load the folder named on the command line, then answer until the input ends."""
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        shape = (asked["batch"], asked["prompt"])
        tokens = torch.randint(100, 40_000, shape, generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                min_new_tokens=asked["new"],
                max_new_tokens=asked["new"],
                pad_token_id=0,
            )
        assert out.shape == (shape[0], shape[1] + asked["new"]), out.shape
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
