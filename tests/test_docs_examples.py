"""The Python in README and docs: its imports exist, and classes of one's own do what is said."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from baselines.posthoc.symmetrized import Symmetrized
from baselines.token_reduction.reduced import Reduced
from octic import OcticVisionTransformer
from tests.baselines.posthoc import toys as posthoc
from tests.baselines.token_reduction import toys as reduction
from tests.deit.tiny import make_batch, make_recipe
from tests.evaluation.toys import ToyImages, ToyNet

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2}


def blocks() -> list[tuple[str, str]]:
    """Page and text of every fenced block of Python."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (page.name, code)
        for page in pages
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def example(name: str) -> dict[str, Any]:
    """What the block that defines `name` defines."""
    (code,) = [code for _, code in blocks() if re.search(rf"^(class|def) {name}\b", code, re.M)]
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize(("page", "code"), blocks())
def test_imports_exist(page: str, code: str) -> None:
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    for module, alias in ((node.module, alias) for node in imports for alias in node.names):
        found = importlib.import_module(module or "")
        assert hasattr(found, alias.name), f"{page}: {module} has no {alias.name}"


@pytest.mark.parametrize(
    ("name", "options"), [("Lengths", {}), ("GatedMlp", {"invariant": True, "depth": 4})]
)
def test_octic_nets_with_layers_of_ones_own_keep_the_symmetry(name: str, options: dict) -> None:
    torch.manual_seed(0)
    defined = example(name)
    if name == "Lengths":
        options = {"invariant": defined[name], **options}
    kind = defined.get("Variant", OcticVisionTransformer)
    net, x = kind(**{**SMALL, "num_heads": 2, **options}).eval(), torch.randn(2, 3, 32, 32)
    logits = net(x)
    assert logits.std() > 1e-3
    for turned in (x.rot90(1, (2, 3)), x.flip(3)):
        torch.testing.assert_close(net(turned), logits, rtol=1e-4, atol=1e-5)


def test_a_group_of_ones_own_is_one() -> None:
    group = example("diagonals")["diagonals"]()
    assert group.order == 4
    net = OcticVisionTransformer(**SMALL, num_heads=2, group=group, invariant=True).eval()
    x = torch.randn(2, 3, 32, 32)
    for element in group.elements:
        torch.testing.assert_close(net(element.on_images(x)), net(x), rtol=1e-4, atol=1e-5)


def test_an_aggregator_of_ones_own_makes_a_classifier_invariant() -> None:
    net = Symmetrized(posthoc.make("timm"), aggregator=example("Median")["Median"]()).eval()
    x = posthoc.images()
    torch.testing.assert_close(net(x.rot90(1, (2, 3))), net(x), rtol=1e-4, atol=1e-5)


def test_a_reduction_of_ones_own_reduces_and_gives_whole_maps() -> None:
    largest, host = example("Largest")["Largest"], reduction.net_of("hybrid")
    x = reduction.images()
    assert torch.equal(Reduced(host, largest(keep=1.0, block=4))(x), host(x))
    net, lengths = Reduced(host, largest(keep=0.5, block=4)), []
    host.blocks[-1].register_forward_pre_hook(
        lambda block, given: lengths.append(given[0].shape[1])
    )
    net(x)
    maps = host.features(x)[0].patches
    assert lengths[0] == 1 + maps[0, ..., 0].numel() // 2
    assert net.features(x)[0].patches.shape == maps.shape


def test_a_loss_of_ones_own_adds_its_term() -> None:
    recipe = make_recipe(kind=example("Certain")["Certain"], entropy_weight=0.5)
    plain, batch = make_recipe(), make_batch()
    recipe.load_state_dict(plain.state_dict())
    ours, theirs = recipe.eval().losses(batch, 0), plain.eval().losses(batch, 0)
    torch.testing.assert_close(ours["loss"], theirs["loss"] + 0.5 * ours["entropy"])


def test_a_probe_of_ones_own_gives_a_figure(tmp_path: Path) -> None:
    probe = example("NearestMean")["NearestMean"]()
    data = {"train": ToyImages(30, 0), "val": ToyImages(20, 1)}
    assert 50 < float(probe(ToyNet(), data, tmp_path, 0)["top1"]) <= 100


def test_data_of_ones_own_are_read(tmp_path: Path) -> None:
    for folder, ending in (("photos", "jpg"), ("masks", "png")):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8), 1).save(tmp_path / folder / f"a.{ending}")
    (tmp_path / "val.txt").write_text("a\n")
    masked = example("leaves")["leaves"](str(tmp_path), "val")
    assert len(masked) == 1 and masked.read_mask(0).max() == 1
    (tmp_path / "train.csv").write_text("photos/a.jpg,leaf\n")
    table = example("Table")["Table"](tmp_path / "train.csv", tmp_path)
    assert table.read(0).mode == "RGB" and table.class_names == ["leaf"]
