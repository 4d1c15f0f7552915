"""Run folders as trainings and evaluations leave them, small and made up."""

import json
from pathlib import Path

from PIL import Image


def make_run(folder: Path, *, name: str = "my_run", steps: int = 60) -> Path:
    """A training's folder: config, code, metrics, summary, a checkpoint, exported weights."""
    (folder / "checkpoints" / str(steps)).mkdir(parents=True)
    (folder / "checkpoints" / str(steps) / "recipe.pt").write_bytes(b"0" * 2000)
    (folder / "exported").mkdir()
    (folder / "exported" / "model.safetensors").write_bytes(b"0" * 3000)
    config = {
        "name": name,
        "backbone": {"_target_": "octic.models.hybrid_deit_small_patch16", "depth": 4},
        "recipe": {"_target_": "deit.recipe.DeiT"},
        "data": {"train": {"_target_": "utils.data.embedded.digits"}},
        "probes": {
            "accuracy": {"_target_": "evaluation.probes.accuracy.AccuracyProbe", "symmetries": True}
        },
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "git.txt").write_text("0123abc torch 2.11\n")
    lines = [{"step": k, "loss": 1 / k, "lr": k * 1e-4} for k in range(1, steps + 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    summary = {"name": name, "step": steps, "total_steps": 100, "finished": False}
    summary |= {"seconds": 3725.2, "parameters": 453898, "accuracy/acc1": 97.25}
    (folder / "summary.json").write_text(json.dumps(summary))
    draw(folder / "curves.png", (50, 40))
    return folder


def make_evaluation(folder: Path) -> Path:
    """An evaluation's folder: results and a picture in a probe's own folder."""
    (folder / "knn").mkdir(parents=True)
    entry = {
        "protocol": {"feature": "class token", "vote": "softmax of similarity / 0.07", "ks": [10]},
        "figures": {"knn10_top1": 86.912, "knn10_top5": 99.1, "knn20_top1": 85.5},
    }
    (folder / "results.json").write_text(json.dumps({"knn": entry}))
    draw(folder / "knn" / "neighbours.png", (80, 60))
    return folder


def make_quickstart(folder: Path) -> Path:
    """Two runs below one roof, with figures side by side."""
    for name in ("octic", "plain"):
        make_run(folder / name)
    figures = {"octic": {"parameters": 450000, "error": 3.7e-7}, "plain": {"parameters": 820000}}
    entry = {"comparison": {"protocol": {"knn": {"vote": "weighted"}}, "figures": figures}}
    (folder / "results.json").write_text(json.dumps(entry))
    draw(folder / "pca_octic.png", (90, 60))
    return folder


def draw(path: Path, size: tuple[int, int], colour: str = "teal") -> Path:
    """A picture of one colour."""
    Image.new("RGB", size, colour).save(path)
    return path
