"""What the speed of a net is made of: blocks, growth and the least times, and their mistakes."""

import json

import pytest
import torch

from baselines.evit.block import EViTBlock
from evaluation.commands import anatomy as command
from evaluation.cost import block_times, blocks, growth
from evaluation.cost.blocks import cost_of_block, kept_bytes, shape_of
from evaluation.cost.growth import Point
from evaluation.cost.models import find_backbone, make_net
from evaluation.cost.roofline import BANDWIDTHS, SIZES, layers_of
from evaluation.cost.timing import PASSES, Turn
from octic.block import OcticBlock
from utils.errors import UserError
from vit.block import Block

OPTIONS = {"num_heads": 2, "init_values": 1e-4}


@pytest.mark.parametrize("bf16", [False, True])
def test_an_octic_block_keeps_no_more_than_a_plain_one(bf16):
    octic, plain = (
        cost_of_block(kind(64, **OPTIONS), 17, 64, bf16=bf16) for kind in (OcticBlock, Block)
    )
    assert octic.kept_bytes <= 0.96 * plain.kept_bytes
    assert octic.multiply_adds < plain.multiply_adds / 3
    assert octic.operators <= 42


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("hybrid_deit_small_patch16", 32, (5, 384)),
        ("dinov2_vit_small_patch16", 48, (10, 384)),
        ("resmlp_12", 224, (196, 384)),
        ("vit_tiny_patch16_224", 224, (197, 192)),
    ],
)
def test_the_net_tells_what_its_blocks_get(name, size, shape):
    assert shape_of(name, make_net(name, find_backbone(name, size=size), "cpu"), size) == shape


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("convnext_isotropic_small", 224, "do not take tokens"),  # maps
        ("dhvt_tiny_cifar_patch4", 32, "do not take tokens"),  # and the grid
        ("deit_small_patch16_LS", 30, "does not take 30 x 30 pixels"),
    ],
)
def test_blocks_of_other_things_than_tokens_are_refused_in_one_line(name, size, said):
    node = find_backbone(name, size=32 if size == 30 else size)
    with pytest.raises(UserError, match=f"^[^\\n]*{name}[^\\n]*{said}"):
        shape_of(name, make_net(name, node, "cpu"), size)


def test_a_block_that_returns_more_than_tokens_costs_as_one_that_does_not():
    reducing, plain = (cost_of_block(kind(64, num_heads=2), 17, 64) for kind in (EViTBlock, Block))
    assert reducing.multiply_adds == plain.multiply_adds


def test_kept_bytes_are_those_of_the_tensors_kept():
    x = torch.randn(2, 3, 8)
    assert kept_bytes(torch.nn.GELU(), x) == x.numel() * 4
    assert kept_bytes(torch.nn.Linear(8, 5), x) == x.numel() * 4  # its weight is a parameter
    assert kept_bytes(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), x) == (
        2 * x.numel() * 4
    )


@pytest.mark.parametrize("size", SIZES)
def test_least_times_have_the_operations_of_the_counter(size):
    width, heads, patch = SIZES[size]
    tokens = (224 // patch) ** 2 + 1
    for kind in (OcticBlock, Block):
        with torch.device("meta"):
            block = kind(width, num_heads=heads)
        from utils.flops import count_operations

        counted = count_operations(block, torch.empty(1, tokens, width, device="meta"))
        layers = layers_of(size, octic=kind is OcticBlock, batch=1)
        assert sum(layer.operations for layer in layers) == counted.forward
        # Twice the images move twice the tokens, and the same weights.
        twice = layers_of(size, octic=kind is OcticBlock, batch=2)
        pairs = zip(layers, twice, strict=True)
        weights = sum(2 * one.moved_bytes - two.moved_bytes for one, two in pairs)
        assert weights == 2 * sum(p.numel() for p in block.parameters() if p.ndim > 1)
    (fc1,) = (layer for layer in layers if layer.name == "fc1")
    assert fc1.seconds(1e15, 1e30) == fc1.operations / 1e15
    assert fc1.seconds(1e30, BANDWIDTHS["H100"]) == fc1.moved_bytes / 3.35e12


def test_growth_is_measured_drawn_and_written(tmp_path, capsys):
    growth.show(
        "hybrid_deit_small_patch16",
        "deit_small_patch16_LS",
        varied={"depth": [2, 4], "batch": [1, 2]},
        device="cpu",
        base=Point(size=32, depth=2),
        steps=1,
        json_file=tmp_path / "growth.json",
        picture_file=tmp_path / "growth.png",
    )
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert len(rows) == 8 and all(row["inference"] > 0 and row["mib"] > 0 for row in rows)
    deeper = [row["mib"] for row in rows if row["varied"] == "depth" and "hybrid" in row["net"]]
    assert deeper[1] > 1.2 * deeper[0]
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "batch 2" in out
    for octic, plain in zip(rows[::2], rows[1::2], strict=True):  # how many times as fast
        assert f" {plain['inference'] / octic['inference']:.2f} " in out


def test_growth_until_a_point_that_is_refused_is_kept(tmp_path, monkeypatch, capsys):
    def turns(nets, kind, **_):
        return {name: [Turn([2.0], None)] for name in nets}, []

    monkeypatch.setattr(growth, "measure_in_turn", turns)
    file, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    with pytest.raises(UserError, match="^size 40: .* not a multiple of the patch size"):
        growth.show(
            "hybrid_deit_small_patch16",
            "deit_small_patch16_LS",
            varied={"size": [32, 40]},
            device="cpu",
            base=Point(depth=2),
            steps=1,
            json_file=file,
            picture_file=picture,
        )
    assert [row["size"] for row in json.loads(file.read_text())["rows"]] == [32, 32]
    assert "size 32 " in capsys.readouterr().out.split("growth of cost")[1] and picture.is_file()


def test_a_picture_of_growth_within_one_decade_has_numbers_on_its_axes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(growth.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    point = {"net": "a", "varied": "size"}
    values = [(32, 0.02), (64, 0.05)]
    growth.draw(
        [{**point, "size": x, **dict.fromkeys([*PASSES, "mib"], y)} for x, y in values],
        tmp_path / "growth.png",
    )
    figures[0].draw_without_rendering()
    for axis in figures[0].axes:
        assert [text.get_text() for text in axis.get_xticklabels(which="both")] == ["32", "64"]
        bottom, top = axis.get_ylim()
        shown = [
            t for t in axis.get_yticklabels(which="both") if bottom < t.get_position()[1] < top
        ]
        assert any(text.get_text() for text in shown)


def test_blocks_before_a_net_that_is_refused_are_printed(monkeypatch, capsys):
    cost = blocks.BlockCost("Block", 384, 5, 10**9, 14, 44, 2**20, None)
    monkeypatch.setattr(blocks, "cost_of_block", lambda *_, **__: cost)
    with pytest.raises(UserError, match="no model 'deit_smal_patch16_LS'"):
        blocks.measure(["deit_small_patch16_LS", "deit_smal_patch16_LS"], size=32)
    assert "384" in capsys.readouterr().out.split("cost of a block")[1]


def test_growth_is_in_seconds_of_a_pass(monkeypatch):
    """A larger batch is not divided by its images; memory is what its own pass keeps."""
    seen = []

    def turns(nets, kind, **_):
        seen.append({(*nets[n].images.shape[::3], len(nets[n].net.blocks)) for n in nets})
        return {name: [Turn([2.0], None)] for name in nets}, []

    monkeypatch.setattr(growth, "measure_in_turn", turns)
    names = "hybrid_deit_small_patch16", "deit_small_patch16_LS"
    (rows,) = growth.measure(*names, varied={"batch": [3]}, base=Point(size=32, depth=2))
    assert seen == [{(3, 32, 2)}] * 2 and [row["net"] for row in rows] == [*names]
    assert {row[kind] for row in rows for kind in PASSES} == {2.0}
    net = make_net(names[1], find_backbone(names[1], size=32, keywords={"depth": 2}), "cpu").train()
    kept = kept_bytes(net, torch.randn(3, 3, 32, 32)) / 2**20
    assert rows[1]["mib"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("kind", (Block, OcticBlock, EViTBlock))
def test_a_block_is_called_as_in_its_net(kind) -> None:
    """An octic block takes the addend of the one before it and leaves its own."""
    block = kind(64, num_heads=4, init_values=1e-4)
    steps = block_times.steps_of(block, (2, 5, 64), "eager", "cpu")
    outputs, grads = steps["forward"](), steps["forward and backward"]()
    assert [out.shape for out in outputs] == [(2, 5, 64)] * (2 if block.defers_sum else 1)
    assert all(grad.isfinite().all() for grad in grads)


def test_times_are_told_and_kept_as_they_come(tmp_path, monkeypatch, capsys):
    """The arithmetic around a CUDA device's times, an interrupt in the sixth of eight."""
    times = iter([100.0, 300.0, 80.0, 240.0, 50.0])

    def clock(step):
        if (microseconds := next(times, None)) is None:
            raise KeyboardInterrupt
        kernel = block_times.Kernel("void at::native::add<float>(int)", 2, microseconds)
        return block_times.BlockTime(microseconds, [kernel])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(block_times, "steps_of", lambda *_: dict.fromkeys(block_times.PASSES))
    monkeypatch.setattr(block_times, "time_pass", clock)
    file = tmp_path / "t.json"
    with pytest.raises(KeyboardInterrupt):
        block_times.measure(["hybrid_deit_small_patch16"], size=32, listed=True, json_file=file)
    rows = json.loads(file.read_text())["blocks"]["hybrid_deit_small_patch16"]
    assert [row["times_the_last"] for row in rows] == [1, 1, 1, 1, 2]
    assert rows[-1]["block"] == "OcticBlock" and rows[-1]["kernels"][0]["launches"] == 2
    told, table = capsys.readouterr().out.split("time of a block")
    assert told.splitlines()[-1].endswith("OcticBlock, eager, forward: 50 us")
    assert table.index("OcticBlock") < table.index(" Block ") and "2.00" in table
    assert "1 longest of 1; all 240 us" in table


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("void at::native::add<float>(int)", "add"),
        ("void at::native::(anonymous namespace)::norm_kernel<float>(at::Info)", "norm_kernel"),
        ("void <unnamed>::norm_kernel<at::Half>(int)", "norm_kernel"),
        ("fmha_bf16_sm80(Attention::Kernel<cutlass::bfloat16_t>::Params)", "fmha_bf16_sm80"),
        ("triton_per_fused_add_3", "triton_per_fused_add_3"),
        ("at::native::fill(at::Tensor)", "fill"),
    ],
)
def test_a_kernel_is_shown_without_its_path_and_arguments(name, shown):
    """Whatever paths its arguments have, and from a namespace without a name."""
    assert block_times._short(name) == shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["roofline", "--chip", "B100"], "--chip is H100 or H200"),
        (["growth", "--sizes", "224,x"], "--sizes takes numbers"),
        (["growth", "--models", "deit_small_patch16_LS"], "an octic net and its plain twin"),
        (["growth", "--json", "nowhere/g.json"], "there is no folder nowhere"),
        (["times", "--json", "nowhere/t.json"], "there is no folder nowhere"),
        (["blocks", "--models", "resnet18"], "has no `blocks`"),
        (["growth", "--steps", "0"], "--steps must be a whole number from 1, not 0"),
        (["growth", "--batch-size", "0"], "--batch-size must be a whole number from 1"),
        (["growth", "--threads", "0"], "--threads must be a whole number from 1"),
        (["growth", "--device", "foo"], "device is auto, cpu, cuda or mps, not 'foo'"),
        (["growth", "--picture", "x.foo"], "--picture x.foo must end in .png"),
        (["growth", "--json", "."], ". is a folder"),
        (["growth", "--sizes=", "--batches=", "--depths="], "nothing would be measured"),
        (["blocks", "--json", "b.json"], "--json is for growth and times; blocks does not read it"),
        (["roofline", "--size", "384"], "roofline does not read it"),
        pytest.param(
            ["times"],
            "torch sees none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_every_word_has_its_own_flags_and_defaults():
    words = {name: vars(command.read([name])) for name in ("blocks", "times", "growth", "roofline")}
    assert words["roofline"] == {"what": "roofline", "batch_size": 64, "chip": "H200"}
    assert [words[name]["batch_size"] for name in ("times", "growth")] == [64, 1]
    assert "batch_size" not in words["blocks"]


def test_least_times_are_printed(capsys):
    assert command.main(["roofline", "--chip", "H100"]) == 0
    assert "times" in capsys.readouterr().out
