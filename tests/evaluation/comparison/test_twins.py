"""The quickstart in miniature: two trainings, one table, pictures; the second call resumes."""

import json

import pytest

from evaluation.comparison import twins
from evaluation.comparison.twins import compare
from utils.config.build import plain
from utils.config.compose import compose_config

TINY = [
    "backbone.patch_size=16",
    "backbone.embed_dim=32",
    "backbone.num_heads=2",
    "backbone.depth=2",
    "recipe.batch_size_per_gpu=4",
    "recipe.crops.local_crops_number=1",
    "recipe.dino_head.num_prototypes=16",
    "recipe.dino_head.hidden_dim=16",
    "recipe.dino_head.bottleneck_dim=8",
    "training.max_steps=2",
    "data.train.split=val",  # a quarter of the images to judge on
    "probes.linear.epochs=1",
    "probes.segmentation.train.split=val",  # a quarter of the scenes to judge on
    "probes.segmentation.resolution=32",
    "probes.segmentation.logreg.C=[1.0]",
    "device=cpu",
]
RUNS = {"octic": "dinov2/quickstart.yaml", "plain": "dinov2/quickstart_plain.yaml"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Both runs of the quickstart, with almost nothing to compute."""
    folder = tmp_path_factory.mktemp("quickstart")
    runs = {
        name: plain(compose_config(file, [*TINY, f"output_dir={folder}/{name}"]))
        for name, file in RUNS.items()
    }
    return {"output_dir": str(folder), "device": "cpu", "runs": runs}


def test_a_slow_start_or_spell_does_not_count_against_a_net(tmp_path):
    """The time is that of all windows of the log, the rate the median of theirs."""
    lines = [
        {"step": 10, "steps_per_second": 0.5, "images_per_second": 2.0},
        {"step": 15, "knn/top1": 3.0},
        {"step": 30, "steps_per_second": 4.0, "images_per_second": 16.0},
        {"step": 40, "steps_per_second": 2.0, "images_per_second": 8.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert twins._speed(tmp_path) == {
        "steps": 40,
        "training time (s)": 10 / 0.5 + 20 / 4 + 10 / 2,
        "training images/s, median": 8.0,
    }


@pytest.mark.slow
def test_table_and_pictures(config, tmp_path_factory, capsys):
    figures = compare(config)
    printed = capsys.readouterr().out
    for name in figures:  # whose figures follow is said
        assert f"--- evaluating the untrained net: {name}, in " in printed
    octic, twin = figures["octic"], figures["plain"]
    assert octic["equivariance error of the octic half"] < 1e-5
    assert twin["equivariance error of the octic half"] is None
    assert octic["multiply-adds"] < twin["multiply-adds"]
    assert octic["steps"] == twin["steps"] == 2
    for figure in ("linear top-1", "segmentation mIoU, kNN"):
        assert 0 < octic[f"{figure}, untrained"] <= 100
    names = ("losses", "pca_octic", "pca_plain", "neighbours_octic", "neighbours_plain")
    for name in names:
        path = f"{config['output_dir']}/{name}.png"
        assert path in printed
        with open(path, "rb") as file:
            assert file.read(4) == b"\x89PNG"
    assert f"{config['output_dir']}/report.html" in printed
    with open(f"{config['output_dir']}/results.json") as file:
        assert json.load(file)["comparison"]["figures"] == figures


@pytest.mark.slow
def test_second_call_keeps_what_is_computed(config, capsys):
    compare(config)
    capsys.readouterr()
    compare(config)
    assert capsys.readouterr().out.count("already at step 2 of") == 2
    with open(f"{config['output_dir']}/octic/metrics.jsonl") as file:
        steps = [json.loads(line) for line in file]
    assert sum("loss" in line for line in steps) == 2
