"""Show that transformers loads what ppojax exports, with the same logits; writes export_check.json.

python - <<'EOF'                                 # in ppojax's environment
from ppojax.models import export, load
import json, pathlib
data = pathlib.Path("tests/data/families")
for case in json.loads((data / "cases.json").read_text())["cases"]:
    model = load(data / case)
    export(model, f"/tmp/exported/{case}", dtype=model.origin.config["dtype"], shard_bytes=30_000)
EOF
/tmp/oracle/bin/python tests/data/families/check_export.py /tmp/exported     # in the oracles' (make_oracles.py)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent


def check(case: str, exported: Path) -> dict[str, object]:
    """Load one folder, with all of its tensors used and none made up, and compare the logits."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(
        exported / case, dtype=torch.float32, output_loading_info=True, **eager
    )
    amiss = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(amiss.values()), amiss
    with np.load(HERE / case / "oracle.npz") as oracle, torch.no_grad():
        logits = model.eval()(torch.from_numpy(oracle["token"]).long()).logits.numpy()
        apart = float(np.abs(logits - oracle["logits"]).max())
    print(f"{case:20} largest difference of a logit {apart:.1e}")
    return {"files": len(list((exported / case).glob("*.safetensors"))), "largest_logit_difference": apart}


def main(exported: Path) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = {case: check(case, exported) for case in json.loads((HERE / "cases.json").read_text())["cases"]}
    record = {"torch": torch.__version__, "transformers": transformers.__version__, "cases": cases}
    (HERE / "export_check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
