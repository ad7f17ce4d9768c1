"""Show that PEFT loads the adapters that ppojax exports, with ppojax's logits; writes adapter_check.json.

python tests/data/families/check_adapters.py write /tmp/adapters             # in ppojax's environment
/tmp/oracle/bin/python tests/data/families/check_adapters.py check /tmp/adapters     # in the oracles' (README.md)

For every case: adapters on all matrices that can have one (beside experts, of attention alone), drawn at random; the
base, the adapters and the merged model
are exported, and the logits of ppojax's unmerged model stand beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CASES = tuple(json.loads((HERE / "cases.json").read_text())["cases"])


def write(case: str, out: Path) -> None:
    """Export with ppojax."""
    from dataclasses import replace

    import jax

    from ppojax.models import export, load
    from ppojax.models.forward import init
    from ppojax.models.lora import LoRAConfig, combine, merge, split
    from ppojax.models.peft_write import write_peft

    lora = LoRAConfig(rank=3, alpha=6.0, rslora=case.startswith("qwen"))
    model = load(HERE / case)
    if model.spec.moe is not None:
        pairs = init(replace(model.definition, lora=lora), jax.random.key(0))["layers"]["lora"]
        attention = tuple(n for n in pairs if n.removeprefix("shared_") not in ("gate", "up", "down"))
        lora = lora.model_copy(update={"targets": attention})
    model = replace(model, definition=replace(model.definition, lora=lora))
    leaves, tree = jax.tree.flatten(split(init(model.definition, jax.random.key(0)), lora)[0])
    noise = [0.2 * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
    params = combine(model.params, jax.tree.unflatten(tree, noise))
    export(model, out / case / "base")
    export(model, out / case / "merged", params=merge(params, lora))
    base = str(out / case / "base")
    write_peft(out / case / "adapter", model.family, model.spec, params, lora, model.origin, base=base)
    with np.load(HERE / case / "oracle.npz") as oracle:
        np.save(out / case / "logits.npy", model.logits(params, oracle["token"]))


def check(case: str, out: Path) -> dict[str, object]:
    """Load with PEFT and compare: logits, and after a merge every tensor."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    base, merged = (
        AutoModelForCausalLM.from_pretrained(out / case / which, dtype=torch.float32, **eager)
        for which in ("base", "merged")
    )
    with np.load(HERE / case / "oracle.npz") as oracle, torch.no_grad():
        token, without = torch.from_numpy(oracle["token"]).long(), oracle["logits"]
        # What PEFT cannot place it only warns of: warnings are errors here, and every matrix is counted.
        model = PeftModel.from_pretrained(base, out / case / "adapter").eval()
        stored = json.loads((out / case / "adapter/adapter_config.json").read_text())
        pairs = sum(".lora_A." in name for name, _ in model.named_parameters())
        logits, ours = model(token).logits.numpy(), np.load(out / case / "logits.npy")
        apart = float(np.abs(logits - ours).max())
        folded, want = model.merge_and_unload().state_dict(), merged.state_dict()
    assert folded.keys() == want.keys()
    off = max(float((folded[name] - want[name]).abs().max()) for name in want)
    moved = float(np.abs(ours - without).max())
    print(f"{case:20} {pairs:3} pairs: logits moved by {moved:.2f}, apart {apart:.1e}, merged tensors apart {off:.1e}")
    assert apart < 1e-4 and off < 1e-5 and moved > 0.1
    return {
        "adapters": pairs,
        "target_modules": stored["target_modules"],
        "logits_moved_by": round(moved, 3),
        "largest_logit_difference": apart,
        "largest_difference_of_a_merged_weight": off,
    }


def main(step: str, out: Path) -> None:
    if step == "write":
        for case in CASES:
            write(case, out)
        return
    import warnings

    import peft
    import torch
    import transformers

    warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = {case: check(case, out) for case in CASES}
    record = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    text = json.dumps(record | {"cases": cases}, indent=1)
    (HERE / "adapter_check.json").write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
