"""Names become nets, and every octic net has its plain twin."""

import re

import pytest
import yaml

from evaluation.commands.complexity import parse_complexity
from evaluation.cost.counting import count_cost
from evaluation.cost.models import (
    find_backbone,
    make_groups,
    make_net,
    own_size,
    registered,
)
from evaluation.nets import num_classes_of
from utils.config.files import CONFIGS
from utils.errors import UserError

SETTINGS = yaml.safe_load((CONFIGS / "complexity.yaml").read_text())
TWINS = SETTINGS["twins"]


def target(name):
    return find_backbone(name)["_target_"]


def test_every_octic_net_has_a_twin_and_no_plain_one_has():
    octic = {name for name in registered() if target(name).startswith("octic.")}
    assert octic <= set(TWINS) and len(octic) == 18 + 21 + 2  # octic, mirror, for debugging
    assert not [name for name in TWINS if target(name).startswith("vit.")]
    assert not set(TWINS) & set(TWINS.values())


@pytest.mark.parametrize(
    ("name", "twin"), [pair for pair in TWINS.items() if target(pair[0]).startswith("octic.")]
)
def test_twins_are_alike_but_for_the_octic_half(name, twin):
    nets = [make_net(each, find_backbone(each), "meta") for each in (name, twin)]
    for key in ("depth", "patch_size", "num_classes", "img_size"):
        assert getattr(nets[0], key) == getattr(nets[1], key), key
    # Blocks of equal width: a classifier may read a part of it.
    assert getattr(nets[0], "token_dim", nets[0].embed_dim) == nets[1].embed_dim
    assert nets[0].blocks[-1].attn.num_heads == nets[1].blocks[-1].attn.num_heads


def test_the_default_list_is_the_published_deit_nets_and_their_twins():
    assert set(SETTINGS["models"]) == {
        *(
            name
            for name in TWINS
            if target(name).startswith("octic.models.")
            and not name.startswith("octic_")
            and ("deit_large" in name or "deit_huge" in name)
        ),
        *("deit_large_patch16_LS", "deit_huge_patch14_LS"),
    }
    assert set(SETTINGS["keywords"]) < set(SETTINGS["models"])


def test_groups_take_the_twin_along_and_leave_others_alone():
    names = ["resnet18", "hybrid_deit_small_patch16", "d8_inv_early_deit_small_patch16"]
    groups = make_groups([*names, "resnet18"], TWINS)
    assert groups == [
        (None, ("resnet18",)),
        ("deit_small_patch16_LS", ("deit_small_patch16_LS", *names[1:])),
    ]
    assert make_groups(["deit_small_patch16_LS"], TWINS) == [(None, ("deit_small_patch16_LS",))]
    without = TWINS | {"hybrid_deit_small_patch16": None}
    assert make_groups(names[1:2], without) == [(None, (names[1],))]


def test_all_means_every_backbone_that_a_name_describes():
    groups = make_groups(["all"], TWINS)
    names = {*registered(), *TWINS.values()}
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    assert names - set(registered()) == {"deit_small_patch16_224", "deit_base_patch16_224"}
    assert len(groups) == len(names) - len(TWINS)


def test_of_a_size_all_means_those_that_take_it():
    for size, own in ((96, "gevit_pcam_p4"), (28, "posthoc_vit_mnist")):
        chosen = [name for group in make_groups(["all"], {}, size=size) for name in group.names]
        assert chosen == registered(size) and {own, "deit_small_patch16_LS"} <= set(chosen)
        assert set(chosen) < set(registered()) and "swag_vit_b16_in1k" not in chosen
        for name in chosen:
            find_backbone(name, size=size)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_small_patch16_304_shrink05", 304),
        ("gevit_rotmnist_p4", 28),
        ("swag_vit_l16_in1k", 512),
        ("deit_huge_patch14_LS", 224),
        ("vit_base_patch16_384", 384),
    ],
)
def test_a_net_that_is_told_no_size_has_its_own(name, size):
    assert own_size(name) == size
    assert find_backbone(name) == find_backbone(name, size=size)


def test_nets_of_timm_keep_their_classes_and_take_the_size():
    assert find_backbone("resnet18", size=64)["num_classes"] == 1000
    node = find_backbone("vit_tiny_patch16_224", size=64)
    net = make_net("vit_tiny_patch16_224", node, "meta")
    assert net.net.patch_embed.grid_size == (4, 4) and num_classes_of(net) == 1000
    assert find_backbone("vit_small_patch14_dinov2.lvd142m")["num_classes"] == 0
    assert find_backbone("hybrid_deit_small_patch16", size=64)["img_size"] == 64


def test_the_line_of_the_docs_counts_as_it_says():
    """A wrapper is read by its name, around the net of its config."""
    page = (CONFIGS.parent / "docs/posthoc.md").read_text()
    names = re.search(r"complexity.py --models (\S+) --check", page)[1].split(",")
    counted = [count_cost(name, find_backbone(name)).multiply_adds / 1e9 for name in names]
    assert names[0] == "symmetrized"
    assert f"the last counts {counted[0]:.2f} G\nmultiply-adds against {counted[1]:.2f} G." in page
    reduced = count_cost("reduced", find_backbone("reduced", keywords={"method": "evit"}))
    assert reduced.multiply_adds / 1e9 < counted[1]
    assert not {"symmetrized", "reduced"} & set(registered())


@pytest.mark.parametrize("name", ["timm", "torchvision", "file"])
def test_an_adapter_is_no_model(name):
    with pytest.raises(UserError, match=f"{name} is an adapter, which needs a model name"):
        find_backbone(name)


@pytest.mark.parametrize("name", ["hybrid_deit_smal_patch16", "resnet17"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(UserError, match=f"there is no model '{name}'"):
        find_backbone(name)


def test_a_net_of_the_users_own_is_measured_at_the_asked_size(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_costs.py").write_text(
        "class Sized:\n    def __init__(self, img_size=32):\n        pass\n\n\n"
        "class Free:\n    def __init__(self, width=8):\n        pass\n"
    )
    with pytest.raises(UserError, match="there is no model 'own_costs.Sized'"):
        find_backbone("own_costs.Sized")
    monkeypatch.setenv("OCTIC_PACKAGES", "own_costs")
    sized = {"_target_": "own_costs.Sized", "img_size": 64}
    assert find_backbone("own_costs.Sized", size=64) == sized
    with pytest.raises(UserError, match="own_costs.Sized is for images of 32 pixels: size=32, not"):
        find_backbone("own_costs.Sized", size=64, keywords={"img_size": 32})
    free = {"_target_": "own_costs.Free", "width": 4}
    assert find_backbone("own_costs.Free", keywords={"width": 4}) == free
    with pytest.raises(UserError, match="own_costs has no 'Fre'; did you mean 'Free'"):
        find_backbone("own_costs.Fre")


def test_a_net_in_a_folder_beside_the_run_file_has_a_name(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTIC_PACKAGES", "tests")
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/mine.yaml").write_text("_target_: tests.evaluation.toys.ToyNet\n")
    (tmp_path / "costs.yaml").write_text("defaults: [/complexity, _self_]\n")
    config = parse_complexity(["--config-file", str(tmp_path / "costs.yaml"), "--models", "mine"])
    node = find_backbone("mine", keywords=config["keywords"]["mine"])
    assert type(make_net("mine", node, "cpu")).__name__ == "ToyNet"


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"depth: 2"])
def test_a_file_beside_the_run_file_that_describes_no_net_is_one_line(tmp_path, capsys, content):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/mine.yaml").write_bytes(content)
    (tmp_path / "costs.yaml").write_text("defaults: [/complexity, _self_]\n")
    with pytest.raises(SystemExit) as left:
        parse_complexity(["--config-file", str(tmp_path / "costs.yaml"), "--models", "mine"])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("error: ") and "backbone/mine.yaml" in error and error.count("\n") == 1
