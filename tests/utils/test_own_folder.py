"""A folder of images of one's own through a short training: broken files, no labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.config.compose import compose_config
from utils.errors import UserError
from utils.run import train

TINY = [
    "data=folder",
    "backbone.embed_dim=32",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "recipe.batch_size_per_gpu=8",
    "recipe.dino_head.num_prototypes=16",
    "recipe.dino_head.hidden_dim=16",
    "training.max_steps=1",
    "probes.knn.ks=[5]",
]


def make_folder(root: Path) -> Path:
    """Two classes of twelve images each."""
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def run(root: Path, output: Path, *words: str) -> dict[str, float]:
    """One step on the folder, then the probe."""
    options = [*TINY, f"data.root={root}", f"output_dir={output}", *words]
    return train(compose_config("dinov2/quickstart.yaml", options))


def test_skipped_images_are_left_out_of_training_and_probe(tmp_path):
    root = make_folder(tmp_path / "images")
    (root / "cats/broken.png").write_text("no image")
    # As many images a step as there are, so that it meets the broken one.
    words = ("recipe.on_error=skip", "recipe.batch_size_per_gpu=25")
    summary = run(root, tmp_path / "run", *words)
    assert summary["unread_images"] == 1
    assert summary["step"] == 1 and "knn/knn5_top1" in summary


def test_what_a_probe_stumbles_over_does_not_cost_what_was_trained(tmp_path):
    root = make_folder(tmp_path / "images")
    (root / "cats/broken.png").write_text("no image")
    words = ("recipe.on_error=skip", "probes.knn.on_error=raise")
    with pytest.raises(UserError, match=r"broken\.png"):
        run(root, tmp_path / "run", *words)
    assert (tmp_path / "run/exported/model.safetensors").is_file()


def test_images_without_labels_train_without_the_probe(tmp_path, capsys):
    root = make_folder(tmp_path / "images")
    summary = run(root, tmp_path / "run", "data.labels=false")
    assert summary["step"] == 1 and "knn/knn5_top1" not in summary
    assert "probe knn is left out: data.train has no labels" in capsys.readouterr().out
