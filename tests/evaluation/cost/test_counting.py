"""Parameters and multiply-adds of every registered model, the published ones among them."""

import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from evaluation.cost.counting import check_counted, count_cost
from evaluation.cost.cross_check import (
    Untraceable,
    count_with_fvcore,
    explain_difference,
    require_fvcore,
)
from evaluation.cost.models import find_backbone, make_net, own_size, registered
from evaluation.published import PUBLISHED
from tests.evaluation.backbones import IMAGE_SIZE, any_backbone
from utils.config.files import CONFIGS
from utils.errors import UserError
from utils.flops import Operations, count_one_image, count_operations

SETTINGS = yaml.safe_load((CONFIGS / "complexity.yaml").read_text())
# The published figures count elementwise work too, which is at most so much more.
ELEMENTWISE = 0.02
# Target of a config -> least and greatest share of the twin's multiply-adds and parameters.
SHARES = {
    "octic.models.": ((0.58, 0.65), (0.55, 0.6)),
    "octic.mirror_models.d2_deit": ((0.51, 0.59), (0.49, 0.51)),
    "octic.mirror_models.": ((0.75, 0.8), (0.74, 0.76)),
}


@cache
def counted(name: str) -> tuple[int, Operations]:
    """Parameters and a forward pass on the meta device."""
    size, node = own_size(name), find_backbone(name, keywords=SETTINGS["keywords"].get(name))
    net = make_net(name, node, "meta")
    return sum(p.numel() for p in net.parameters()), count_one_image(net, size, backward=False)


ALL_OCTIC = (3 / 16, 0.22), (1 / 8, 0.14)  # attention, embedding and head are a plain net's


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """As stated, in whole millions (175.5 as 175) and 10^9 multiply-adds."""
    parameters, operations = counted(name)
    gmacs, published = operations.forward / 2e9, PUBLISHED[name]
    assert abs(parameters / 1e6 - published.parameters_m) < 0.6
    assert gmacs <= published.gmacs + 0.5 and gmacs * (1 + ELEMENTWISE) > published.gmacs - 0.5


@pytest.mark.parametrize("name", registered())
def test_every_backbone_is_counted_to_the_last_operator(name):
    """An octic half takes away two fifths of a twin's multiply-adds, a mirror half one."""
    parameters, operations = counted(name)
    assert not operations.uncounted
    twin, target = SETTINGS["twins"].get(name), find_backbone(name)["_target_"]
    shares = next((SHARES[kind] for kind in SHARES if target.startswith(kind)), None)
    if name.startswith("octic_"):
        shares = ALL_OCTIC
    if twin and shares:
        twins_parameters, twins_operations = counted(twin)
        products = operations.forward / twins_operations.forward
        for share, (least, most) in zip(
            (products, parameters / twins_parameters), shares, strict=True
        ):
            assert least < share < most


@pytest.mark.parametrize("name", [name for name in registered() if "small" in name])
def test_backward_too(name):
    """A step costs three forward passes, less the gradient of the images where no layer asks."""
    cost = count_cost(name, find_backbone(name), size=own_size(name))
    assert 2.9 < cost.training_multiply_adds / cost.multiply_adds <= 3
    assert (cost.multiply_adds * 2, cost.parameters) == (counted(name)[1].forward, counted(name)[0])
    assert cost.trainable <= cost.parameters


def test_an_evit_at_304_pixels_is_cheaper_than_its_twin_at_224():
    """Published: 4.43 against 4.6 G; ours is without elementwise work. The twin has its weights."""
    name = "deit_small_patch16_304_shrink05"
    (_, mine), (parameters, twin) = counted(name), counted(SETTINGS["twins"][name])
    assert (round(mine.forward / 2e9, 2), round(twin.forward / 2e9, 2)) == (4.42, 4.60)
    assert parameters == counted("deit_small_patch16_224_shrink05")[0]


@any_backbone
def test_nets_of_any_kind(backbone):
    cost = count_cost("net", backbone, size=IMAGE_SIZE)
    on_cpu = count_operations(
        make_net("net", backbone, "cpu").eval(), torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    )
    assert cost.operations[:2] == on_cpu[:2]


# Each needs the CPU: autocast, or counts of tokens that are read from values, stop it on meta.
ON_CPU: dict[str, dict[str, Any]] = {
    "hourglass": {"location": 1, "num_clusters": 4},
    "ats": {"locations": [1]},
    "act": {"query_hashes": 4},
    "smyrf": {"start": 1, "num_hashes": 2},
}


@pytest.mark.parametrize("method", ON_CPU)
def test_reduced_nets_that_do_not_run_on_meta(method):
    backbone = {"_target_": "vit.models.deit_tiny_patch16_LS", "_partial_": True, "depth": 3}
    keywords = {"backbone": backbone, "method": method, "options": ON_CPU[method]}
    cost = count_cost("reduced", find_backbone("reduced", size=64, keywords=keywords), size=64)
    assert cost.multiply_adds > 0


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of every shape that it takes as fixed
@pytest.mark.parametrize("name", ["deit_small_patch16_224_shrink", "gevit_rotmnist_p4"])
def test_a_tracer_as_fvcores_follows_nets_whose_shapes_decide(name):
    size, node = own_size(name), find_backbone(name)
    net = make_net(name, node, "cpu").eval()
    images = torch.zeros(1, getattr(net, "in_chans", 3), size, size)
    torch.jit.trace(net, images, check_trace=False)


def test_an_operator_nobody_counts_is_refused_by_name():
    operations = Operations(2, 2, 1, 1, ("mine.product",))
    with pytest.raises(UserError, match=r"^my_net: no formula says what mine.product computes"):
        check_counted("my_net", operations)


def test_a_size_that_does_not_fit_names_the_model():
    with pytest.raises(UserError, match="^hybrid_deit_huge_patch14: .*225"):
        name = "hybrid_deit_huge_patch14"
        count_cost(name, find_backbone(name, size=225), size=225)


def test_without_fvcore_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(UserError, match="pip install fvcore"):
        count_with_fvcore(nn.Linear(2, 2), 8)


def test_a_package_that_fvcore_needs_is_named(monkeypatch, tmp_path):
    (tmp_path / "fvcore").mkdir()
    (tmp_path / "fvcore" / "__init__.py").touch()
    (tmp_path / "fvcore" / "nn.py").write_text("import no_such_package.there")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fvcore"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="fvcore, which needs no_such_package: pip install no_such"):
        require_fvcore()
    for name in ("fvcore", "fvcore.nn"):
        sys.modules.pop(name, None)


def test_a_net_that_the_tracer_cannot_follow_is_told(monkeypatch):
    class Traced:
        def __getattr__(self, name):
            return lambda *args, **keywords: self

        def total(self):
            raise TypeError("type Tensor doesn't define __round__ method")

    counter = SimpleNamespace(FlopCountAnalysis=lambda net, image: Traced())
    monkeypatch.setitem(sys.modules, "fvcore", SimpleNamespace(nn=counter))
    monkeypatch.setitem(sys.modules, "fvcore.nn", counter)
    with pytest.raises(Untraceable, match="cannot follow the net: .*__round__"):
        count_with_fvcore(nn.Conv2d(3, 2, 2), 8)


@pytest.mark.parametrize("name", ["hybrid_deit_small_patch16", "deit_small_patch16_LS"])
def test_fvcore_agrees_on_the_products(name):
    pytest.importorskip("fvcore")
    node = {**find_backbone(name, size=32), "depth": 2}
    theirs = count_with_fvcore(make_net(name, node, "cpu"), 32)
    line = explain_difference(name, count_cost(name, node, size=32).multiply_adds, theirs)
    assert "layer_norm" in line and "not explained" not in line


def test_what_fvcore_counts_besides_is_told_and_the_rest_too():
    theirs = {"total": 1_500_000_000, "by_operator": {"linear": 1, "layer_norm": 200_000_000}}
    line = explain_difference("net", 1_000_000_000, theirs)
    assert line == (
        "fvcore: net: 1.500 against 1.000; it counts besides: layer_norm 0.200; "
        "not explained: +0.300"
    )
