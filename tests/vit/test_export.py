"""Exported programs compute what the net does, for any batch, where our packages are not."""

import importlib.util
import json

import pytest
import timm
import torch
from torch import nn

import octic  # noqa: F401  (registers its models)
from octic import composed
from octic.groups import get_group
from octic.invariants import INVARIANTIZATIONS
from octic.layers import OcticGELU, OcticLayerNorm, OcticLinear
from tests.evaluation.backbones import any_backbone, make
from vit import export

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
SMALL |= {"num_classes": 5, "init_values": 1.0}
REGISTERED = [
    "hybrid_deit_small_patch16",
    "d8_inv_early_deit_small_patch16",
    "deit_small_patch16_LS",
]
WITH_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not WITH_ONNX, reason="needs onnx, onnxscript and onnxruntime")


def small(name: str = "hybrid_deit_small_patch16", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options}).eval()


@pytest.mark.parametrize("group", ["D4", "C4", "mirror"])
def test_operators_in_torchs_words_compute_the_same(group):
    """What is exported agrees with our operators, at random parameters."""
    torch.manual_seed(0)
    width = 4 * get_group(group).order
    layers = [OcticLinear(width, 2 * width, group=group), OcticLayerNorm(width, group=group)]
    asked = nn.Sequential(layers[1], layers[0], OcticGELU(group=group)).eval()
    for parameter in asked.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, width)
    program = torch.export.export(asked, (x,))
    assert not export.foreign_operators(program)
    torch.testing.assert_close(program.module()(x), asked(x), rtol=1e-5, atol=1e-5)


def test_a_program_takes_any_batch_at_its_size():
    """Traced at another size than the net's own; positions are constants."""
    net = small()
    program = export.trace(net, size=48, output="logits")
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("octic" in name or "upsample" in name or "index" in name for name in targets)
    run = program.module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 48, 48)
        torch.testing.assert_close(run(images), net(images), rtol=1e-4, atol=1e-5)


def test_a_net_whose_shapes_depend_on_its_images_is_refused(capsys):
    class Counting(nn.Conv2d):
        def forward(self, images):
            return super().forward(images)[..., : int((images > 0).sum() % 4)]

    with pytest.raises(ValueError, match="depend on what is in the images"):
        export.trace(Counting(3, 1, 1), size=4, output="logits")
    assert not capsys.readouterr().err  # not torch's graph of the net


@pytest.mark.parametrize(
    "invariant",
    [
        "linear",
        *(pytest.param(n, marks=pytest.mark.slow) for n in INVARIANTIZATIONS if n != "linear"),
    ],
)
def test_a_program_takes_any_batch_through_every_invariantization(invariant):
    options = {"invariant": invariant, "depth": 1, "octic_equi_break_layer": 1}
    net = small("d8_inv_early_deit_small_patch16", **options)
    run = export.trace(net, size=32, output="logits").module()
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(run(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("output", export.OUTPUTS)
@any_backbone
def test_every_kind_of_net_runs_in_a_process_of_its_own(backbone, output, tmp_path):
    """A .pt2 reloaded where octic, vit and timm cannot be imported gives the eager net's output."""
    net, path = make(backbone), tmp_path / "model.pt2"
    size = 32 if output == "logits" else 48  # torchvision's own forward takes one size
    export.save_program(export.trace(net, size=size, output=output), path, {"size": size})
    assert export.largest_difference(path, net, size=size, output=output) < export.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_models_run_in_a_process_of_their_own(name, tmp_path):
    net, path = small(name), tmp_path / "model.pt2"
    export.save_program(export.trace(net, size=64, output="features"), path, {"mean": [0.5]})
    assert export.largest_difference(path, net, size=64, output="features") < export.TOLERANCE
    extra = {export.METADATA: ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra[export.METADATA]) == {"mean": [0.5]}


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("output", export.OUTPUTS)
def test_onnx_runs_in_a_process_of_its_own(output, tmp_path):
    """ONNX runtime gives the same; inputs and outputs have names, and the batch is free."""
    import onnx

    net, path = small(depth=4), tmp_path / "model.onnx"
    export.save_onnx(export.trace(net, size=48, output=output), path, {"size": 48})
    assert export.largest_difference(path, net, size=48, output=output) < export.TOLERANCE
    graph = onnx.load(path)
    names = [value.name for value in graph.graph.output]
    assert names == (["cls", "patches"] if output == "features" else ["logits"])
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {prop.key: prop.value for prop in graph.metadata_props} == {"size": "48"}


@pytest.mark.slow
def test_another_nets_file_is_told(tmp_path):
    net, path = small(), tmp_path / "model.pt2"
    export.save_program(export.trace(net, size=32, output="logits"), path, {})
    with torch.no_grad():
        net.head.bias.add_(1)
    assert export.largest_difference(path, net, size=32, output="logits") > 0.01
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="does not run in a process of its own"):
        export.largest_difference(path, net, size=32, output="logits")


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="does not take 36 x 36 images: image size"):
        export.trace(small(), size=36, output="logits")
    with pytest.raises(ValueError, match="unknown output 'tokens'; known: features, logits"):
        export.trace(small(), size=32, output="tokens")


def test_a_net_that_fixes_the_batch_is_refused():
    class Fixed(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1)).view(len(images), -1)

    with pytest.raises(ValueError, match="fixes the number of images, by len"):
        export.trace(Fixed(3 * 64, 5), size=8, output="logits")


@pytest.mark.parametrize("late", [False, True])
def test_constants_that_the_net_writes_to_are_written_to(late):
    """In place, on a view, with values of the images or before and after a constant is read."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]))

        def forward(self, images):
            means, table = images.mean((2, 3)), self.weight.clone()
            if late:
                means = means * table
                table += 1
            else:
                table[:, 0] = means.sum()
            return means + table

    net = Writing()
    run = export.trace(net, size=4, output="logits").module()
    assert net.weight.tolist() == [[1.0, 2.0, 3.0]]
    for batch in (1, 3, 3):
        images = torch.randn(batch, 3, 4, 4)
        torch.testing.assert_close(run(images), net(images), rtol=1e-5, atol=1e-5)


def test_an_unknown_operator_is_named(monkeypatch):
    net = nn.Sequential(nn.Flatten(), OcticLinear(3 * 64, 8))
    assert export.trace(net, size=8, output="logits")
    monkeypatch.setattr(composed, "is_composed", lambda: False)
    with pytest.raises(ValueError, match=r"octic\.irrep_linear\.default; their package must"):
        export.trace(net, size=8, output="logits")


def test_exporting_leaves_every_part_in_its_mode():
    net = timm.create_model(
        "deit_small_patch16_LS", img_size=32, embed_dim=64, depth=2, num_heads=2
    )
    export.trace(net.train(), size=32, output="features")
    assert net.training and net.head.training
