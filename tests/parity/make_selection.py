"""Makes tests/parity/selection from the full folder of stored cases.

    python -m tests.parity.make_selection ../shared/parity

The selection lets a clone prove parity alone. It holds every case of the topics below that the
project runs, but for the large ones named in LEFT_OUT, whose code paths smaller cases cover.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from tests.parity.harness import HERE

SELECTION = HERE / "selection"
MAX_BYTES = 3_000_000

# Topic -> kinds (None: a topic without kinds, every case of it).
TOPICS: dict[str, set[str] | None] = {
    "octic": None,
    "recipes": {
        *("dino_loss", "center", "sk", "ibot", "koleo", "head", "cosine", "sched", "ssl"),
        *("samplers", "json"),
    },
    "evaluation": None,
}
LEFT_OUT = {
    # large; what stays in covers the same code
    *("deit_hybrid", "deit_invariant", "deit_hybrid_resolution"),
    *("deit_hybrid_defaultblocks_nohead", "deit_hybrid_globalpool_break1"),
    *("deit_hybrid_frozen_tokens_nonzero", "stdblock_deit_ls", "dino_hybrid", "dino_hybrid_masks"),
    *("dino_invariant_reg4_masks", "dino_invariant_resolution", "knn_default_ks"),
    *("transform_eval_landscape", "transform_eval_small_portrait", "transform_eval_logreg_224"),
    *("transform_eval_gray", "transform_train_seeded", "seg_transform_ade_like"),
    *("seg_e2e_ade_like", "seg_extract", "seg_knn_bf16_clusters", "knn_two_ranks"),
    *("seg_transform_voc_like", "knn_end_to_end", "attn_pool", "invariant_maxfiltering"),
    "ssl_step_invariant_sinkhorn_separate",
    # of the supervised recipe and the reference's own log format and launcher
    *("deit_weight_decay_groups", "smoothed_value", "slurm_node_list"),
}
# Files that no case names but tests read.
EXTRA = {"octic": ["checkpoint_layouts.json"]}


def files_of(entry: dict[str, Any]) -> list[str]:
    """Names of the files of a case, whichever way its topic writes them."""
    named = entry.get("files", entry.get("file", []))
    if isinstance(named, dict):
        return list(named.values())
    return [named] if isinstance(named, str) else named


def main() -> None:
    """Write the selection anew from the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of all topics")
    source = parser.parse_args().source
    shutil.rmtree(SELECTION, ignore_errors=True)
    for topic, kinds in TOPICS.items():
        target = SELECTION / topic
        target.mkdir(parents=True)
        index = json.loads((source / topic / "index.json").read_text())
        for part, default in (("cases", None), ("json_cases", "json")):
            index[part] = [
                entry
                for entry in index.get(part, [])
                if entry["name"] not in LEFT_OUT
                and (kinds is None or entry.get("kind", default) in kinds)
            ]
            for entry in index[part]:
                for name in files_of(entry):
                    shutil.copyfile(source / topic / name, target / name)
        for name in EXTRA.get(topic, []):
            shutil.copyfile(source / topic / name, target / name)
        (target / "index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")
    size = sum(path.stat().st_size for path in SELECTION.rglob("*") if path.is_file())
    print(f"{SELECTION}: {size:,} bytes of {MAX_BYTES:,}")


if __name__ == "__main__":
    main()
