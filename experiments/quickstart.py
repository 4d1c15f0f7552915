"""Train a small octic ViT and its plain twin with DINOv2 on real digits, and show what they learnt.

key=value words and flags hold for both trainings: recipe.epochs=2, output_dir=DIR, ...
"""

from slurm.launch import launch
from utils.build import plain
from utils.config import parse_config

RUNS = {"octic": "dinov2/quickstart.yaml", "plain": "dinov2/quickstart_plain.yaml"}

if __name__ == "__main__":
    configs = {name: plain(parse_config(default=file)) for name, file in RUNS.items()}
    folder = configs["octic"]["output_dir"]
    for name, config in configs.items():
        config["output_dir"] = f"{folder}/{name}"
    shared = {key: configs["octic"][key] for key in ("name", "device", "launcher", "cluster")}
    launch("evaluation.comparison.compare", {**shared, "output_dir": folder, "runs": configs})
