"""Every run file composes, and every network in it can be built, at no cost, on the meta device."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.config.build import check_targets, plain, resolve
from utils.config.check import describe, networks
from utils.config.compose import compose_config
from utils.config.files import CONFIGS
from utils.config.signature import keywords_of

RUNS = sorted(
    path
    for folder in ("dinov2", "deit", "flopping", "gevit", "evit", "dhvt")
    for path in (CONFIGS / folder).glob("*.yaml")
)
EVALUATIONS = sorted((CONFIGS / "eval").glob("*.yaml"))
POSTHOC = sorted((CONFIGS / "posthoc").glob("*.yaml"))
OWN_ENCODER = """
from torch import nn
def __model_loader__():
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten())
"""
BACKBONES = sorted((CONFIGS / "backbone").glob("*.yaml"))


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    for name in ("IMAGENET_PATH", "EXTRA_PATH"):
        monkeypatch.setenv(name, "/nowhere")


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run_files_compose_and_build(path: Path) -> None:
    """Names, comments and constructors agree; the file says what style asks a recipe to say."""
    config = compose_config(path)
    check_targets(config)
    assert config.name == path.stem, "one name for a thing, all the way"
    net, recipe = networks(plain(config))
    assert recipe.total_steps > 0
    assert all(parameter.is_meta for parameter in net.parameters())
    text = path.read_text()
    for word in ("paper", "command", "hardware"):
        assert word in text.lower(), f"{path.name} does not say its {word}"


@pytest.mark.parametrize("path", EVALUATIONS, ids=name_of)
def test_evaluation_files_compose_and_build(path: Path) -> None:
    config = compose_config(path, base="evaluate")
    check_targets(config)
    networks(plain(config))


@pytest.mark.parametrize("path", POSTHOC, ids=name_of)
def test_posthoc_files_compose_and_build(path: Path) -> None:
    config = compose_config(path, base="posthoc")
    check_targets(config)
    assert config.name == path.stem
    net, _ = networks(plain(config))
    assert getattr(net, "net", net).num_classes in (2, 10)


@pytest.mark.parametrize("path", BACKBONES, ids=name_of)
def test_backbones_build(path: Path, tmp_path: Path) -> None:
    words = [f"backbone={path.stem}"]
    if path.stem == "file":  # of the user's own: there is none to name in the config
        (tmp_path / "mine.py").write_text(OWN_ENCODER)
        words.append(f"backbone.path={tmp_path}/mine.py")
    config = compose_config("evaluate.yaml", words, base="evaluate")
    net, _ = networks(plain(config))
    assert net.embed_dim > 0 and hasattr(net, "features")


@pytest.mark.parametrize("group", ["data", "recipe", "launcher", "cluster"])
def test_every_option_composes(group: str) -> None:
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        check_targets(compose_config("train.yaml", [f"{group}={path.stem}"]))


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=name_of)
def test_a_key_of_the_data_is_for_all_the_images_that_can_take_it(path: Path) -> None:
    """To train on and to judge on, but for the fraction to train on; and none is for nothing."""
    for key in OmegaConf.load(path).keys() - {"train", "val"}:
        config = OmegaConf.create({"data": OmegaConf.load(path)})
        config.data[key] = "told"
        nodes = {name: plain(config.data[name]) for name in config.data.keys() & {"train", "val"}}
        told = {name for name, node in nodes.items() if "told" in node.values()}
        takes = {
            name for name, node in nodes.items() if key in keywords_of(resolve(node["_target_"]))
        }
        assert told and (takes <= told or key == "fraction"), key


def test_probes_compose() -> None:
    for path in sorted((CONFIGS / "probe").glob("*.yaml")):
        config = compose_config(
            "evaluate.yaml", ["probes=null", f"+probe@probes.it={path.stem}"], base="evaluate"
        )
        check_targets(config)


def test_no_personal_facts_in_the_cluster_files() -> None:
    for path in (CONFIGS / "cluster").glob("*.yaml"):
        assert OmegaConf.load(path).get("mail") is None


def test_description_counts_parameters_and_multiply_adds() -> None:
    """The counts of the plain ViT-S/16 by hand: 12 blocks of 12 d^2 weights, 197 tokens."""
    lines = describe(plain(compose_config("train.yaml", ["backbone=dinov2_vit_small_patch16"])))
    dim, tokens, patch = 384, 197, 3 * 16 * 16
    block = (
        12 * dim**2 + (3 + 1 + 4 + 1) * dim + 4 * dim + 2 * dim
    )  # weights, biases, norms, scales
    parameters = 12 * block + 2 * dim + patch * dim + dim + (tokens + 2) * dim
    macs = 12 * tokens * (12 * dim**2 + 2 * tokens * dim) + (tokens - 1) * patch * dim
    assert f"{parameters / 1e6:.2f} M parameters" in lines[0]
    assert f"{macs / 1e9:.2f} G multiply-adds at 224 x 224" in lines[0]
    assert lines[-1] == "the config is valid"


@pytest.mark.parametrize(
    ("file", "words", "parts"),
    [
        (
            "deit/imagenet.yaml",
            ["backbone=timm", "backbone.model_name=resnet18", "~backbone.img_size"],
            0,
        ),
        ("gevit/posthoc_vit_rotmnist.yaml", [], 0),
        ("dinov2/quickstart.yaml", ["recipe.separate_head=true"], 2),
    ],
)
def test_the_cost_is_of_the_images_that_are_trained_on(
    file: str, words: list[str], parts: int
) -> None:
    """The net may be built for others, or not know any; parts beside it have a line each."""
    asked = {
        "deit": "recipe.augmentation.input_size=64",
        "gevit": "recipe.augmentation.augmentation.input_size=28",
        "dinov2": "recipe.crops.global_crops_size=64",
    }[file.partition("/")[0]]
    size = asked.partition("=")[2]
    lines = describe(plain(compose_config(file, [*words, asked])))
    assert f"multiply-adds at {size} x {size}" in lines[0]
    assert lines[1].startswith("dino_head: " if parts else "batch ")
    assert len(lines) == 3 + parts
