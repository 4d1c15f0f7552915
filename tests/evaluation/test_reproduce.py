"""A published file is recognised, judged by its own protocol, and held against what is stated."""

import json
import re
from pathlib import Path

import pytest
import torch

from evaluation import reproduce as command
from evaluation.commands.reproduce import parse_reproduction
from evaluation.published import PUBLISHED, SWAG, Figure
from slurm.command import main
from tests.baselines.token_reduction.test_swag import swag_layout
from utils.config.files import CONFIGS
from utils.errors import UserError

LAYOUTS = json.loads(
    (Path(__file__).parents[1] / "parity/selection/octic/checkpoint_layouts.json").read_text()
)["models"]
PLAIN = {"vit_huge": "dinov2_vit_huge_patch16", "vit_large": "dinov2_vit_large_patch16"}
OF_LAYOUT = {
    layout: entry.get("registered_name") or PLAIN[entry["arch_name"]]
    for layout, entry in LAYOUTS.items()
}


@pytest.mark.parametrize("layout", [key for key in LAYOUTS if OF_LAYOUT[key] in PUBLISHED])
def test_every_published_file_is_recognised(layout, monkeypatch):
    """By names and shapes alone; none passes for another."""
    # Zero strides: real tensors of those shapes without their memory.
    shapes = LAYOUTS[layout]["state_dict"]
    state = {f"_orig_mod.{key}": torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    monkeypatch.setattr(command, "read_state", lambda path: state)
    assert command.model_of("w.pth", None) == OF_LAYOUT[layout]


@pytest.mark.parametrize("name", [n for n, entry in PUBLISHED.items() if entry.recipe == SWAG])
def test_swags_files_are_recognised(name, monkeypatch):
    """In torchvision's layout, as linked."""
    with torch.device("meta"):
        net = command.build_net(command.backbone_node(name))
        state = swag_layout(net, torchvision=True)
    state = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in state.items()}
    monkeypatch.setattr(command, "read_state", lambda path: state)
    assert command.model_of("w.pth", None) == name


def test_every_published_model_has_a_layout_a_config_and_a_link():
    octic = {name for name, entry in PUBLISHED.items() if entry.recipe != SWAG}
    assert octic <= set(OF_LAYOUT.values())
    for name, entry in PUBLISHED.items():
        assert (CONFIGS / entry.config).is_file() and entry.link.startswith("https://")
        if entry.recipe == "DINOv2":
            assert f"override /backbone: {name}\n" in (CONFIGS / entry.config).read_text()


def test_wrong_and_truncated_files_are_refused(tmp_path, capsys):
    torch.save({"teacher": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    for name, words, complaint in (
        ("other.pth", [], "has the layout of no published checkpoint (hybrid_deit"),
        ("other.pth", ["--model", "dinov2_vit_large_patch16"], "missing: blocks.0"),
        ("other.pth", ["--model", "dinov2_vit_larg"], "did you mean 'dinov2_vit_large_patch16'?"),
        ("other.pth", ["--precision", "half"], "--precision must be one of auto, fp32, bf16, fp16"),
        ("other.pth", ["--model", "--model=dinov2_vit_large_patch16"], "--model needs a value"),
        ("other.pth", ["--seg-ade20", "ROOT"], "--seg-ade20; did you mean '--seg-ade20k'?"),
        ("cut.pth", [], "truncated or not a torch file"),
        ("gone.pth", [], "no such weights file"),
        ("epoch=3.pth", [], "epoch=3.pth: no such weights file"),
    ):
        with pytest.raises(SystemExit) as left:
            parse_reproduction([str(tmp_path / name), *words])
        printed = capsys.readouterr().err
        assert left.value.code == 2 and complaint in printed and printed.count("\n") == 1


SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def test_from_file_to_verdict(tmp_path, monkeypatch, capsys):
    """The whole command on a small model: with a stated figure that is right, and a wrong one."""
    node = command.backbone_node("hybrid_deit_small_patch16") | SMALL | {"num_classes": 10}
    monkeypatch.setattr(command, "backbone_node", lambda name: node)
    net = command.build_net(node)
    torch.save({"model": net.state_dict()}, tmp_path / "w.pth")
    name, words = "hybrid_deit_small_patch16", [f"backbone.{k}={v}" for k, v in SMALL.items()]
    words += ["+backbone.num_classes=10", "data=digits", "device=cpu", f"output_dir={tmp_path}/out"]
    monkeypatch.setattr(command, "IMAGENET_VAL", 359)
    figures = {"accuracy/acc1": Figure(10.0, 100.0)}
    entry = PUBLISHED["hybrid_deit_large_patch16"]._replace(figures=figures)
    monkeypatch.setitem(PUBLISHED, name, entry)
    words += ["probes.accuracy.num_workers=0"]
    config = parse_reproduction([str(tmp_path / "w.pth"), "--model", name, *words])
    assert command.reproduce(config)
    said = capsys.readouterr().out
    assert "reproduces" in said and "precision of the net: accuracy fp32; which k" in said
    assert (
        "on a CPU in fp32; the figures were measured on a GPU under autocast: accuracy fp16" in said
    )
    written = json.loads((tmp_path / "out/results.json").read_text())["reproduction"]
    assert written["protocol"]["precision"] == {"accuracy": "fp32"}
    written = written["figures"]
    assert written["published"] == {"accuracy/acc1": 10.0} and written["ours"]["accuracy/acc1"] >= 0
    monkeypatch.setitem(PUBLISHED, name, entry._replace(figures={"accuracy/acc1": Figure(-5, 1)}))
    assert not command.reproduce(config)
    assert "does NOT reproduce" in capsys.readouterr().out
    monkeypatch.setattr(command, "IMAGENET_VAL", 50_000)
    with pytest.raises(UserError, match="50,000 validation images, and data.val holds 359"):
        command.reproduce(config)


def test_figures_are_judged_in_the_precision_they_were_measured_in(capsys):
    """On a GPU; on a CPU in fp32, which is told; another that was asked for stays."""
    for entry in PUBLISHED.values():
        probes = {key.partition("/")[0]: {"precision": "auto"} for key in entry.figures}
        published = {
            name: {"precision": "bf16" if name.startswith("seg_") else "fp16"} for name in probes
        }
        if entry.recipe == SWAG:
            published = {"accuracy": {"precision": "fp32"}}
        assert command.settled({**probes, "off": None}, entry, "cuda") == published
        assert "on a CPU" not in capsys.readouterr().out
        asked = {"own": {"ks": [1]}, "other": {"precision": "bf16"}}
        on_cpu = command.settled({**probes, **asked}, entry, "cpu")
        assert on_cpu == {**dict.fromkeys(probes, {"precision": "fp32"}), **asked}
        told = "on a CPU in fp32; the figures were measured" in capsys.readouterr().out
        assert told is (entry.recipe != SWAG)


@pytest.mark.parametrize(
    ("name", "words", "precisions"),
    [
        ("swag_vit_b16_in1k", [], {"accuracy": "auto"}),
        ("hybrid_deit_large_patch16", ["--precision", "bf16"], {"accuracy": "bf16"}),
        (
            "dinov2_vit_large_patch16",
            ["--seg-ade20k=DIR", "probes.knn.precision=fp32"],
            {"linear": "auto", "knn": "fp32", "seg_ade20k": "auto"},
        ),
    ],
)
def test_the_precision_is_as_published_unless_words_say_another(
    name, words, precisions, monkeypatch
):
    monkeypatch.setattr(command, "model_of", lambda path, name: name)
    monkeypatch.setattr(command, "IMAGENET_VAL", 359)
    probes = parse_reproduction(["w.pth", "--model", name, "data=digits", *words])["probes"]
    assert {probe: node["precision"] for probe, node in probes.items() if node} == precisions


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no folder of images was given"),
        (["--data-path", "nowhere"], "nowhere does not exist"),
        (["--data-path", "images"], "50,000 validation images, and data.val holds 1;"),
    ],
)
def test_images_that_are_not_imagenets_are_refused_before_a_file_is_written(
    words, said, tmp_path, monkeypatch, capsys
):
    (tmp_path / "images/val/n01440764").mkdir(parents=True)
    (tmp_path / "images/val/n01440764/ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_PATH", raising=False)
    monkeypatch.setattr(command, "model_of", lambda path, name: "swag_vit_b16_in1k")
    with pytest.raises(SystemExit) as left:
        main("evaluation.reproduce.reproduce", parse_reproduction, ["w.pth", *words])
    printed = capsys.readouterr().err
    assert left.value.code == 2 and said in printed and printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_knn_is_held_against_the_best_k():
    figures = {"knn/knn10_top1": 80.0, "knn/knn20_top1": 81.4, "knn/knn5_5_per_class_top1": 99.0}
    assert command.best_of_knn(figures) == {"knn/best_top1": 81.4}


def test_table_without_a_file(capsys):
    assert parse_reproduction([]) is None
    printed = capsys.readouterr().out
    rows = [line[1:-1].split("│") for line in printed.splitlines() if line.startswith("│")]
    shown, last = {}, ""
    for name, *_, figures in rows:  # those of a model may take several lines
        last = name.strip() or last
        shown[last] = shown.get(last, "") + figures
    for name, entry in PUBLISHED.items():
        assert entry.link in printed
        values = [float(number) for number in re.findall(r"\d+\.\d+", shown[name])]
        assert sorted(values) == sorted(figure.value for figure in entry.figures.values())
    assert max(map(len, printed.split("protocol: ")[0].splitlines())) <= 100


def test_the_table_shows_the_digits_that_the_verdict_is_on(tmp_path, capsys):
    """A loss that is 0.003 off does not look the same as the stated one."""
    published = PUBLISHED["hybrid_deit_huge_patch14"]
    config = {"published": "hybrid_deit_huge_patch14", "weights": "w", "output_dir": str(tmp_path)}
    config["probes"] = {"accuracy": {"precision": "fp16"}}
    ours = {"accuracy/acc1": 84.9801, "accuracy/loss": 0.8021}
    assert not command.report(config, published, ours)
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    }
    assert rows["accuracy/acc1"] == ["84.996", "84.980", "-0.016", "0.02", "reproduces"]
    assert rows["accuracy/loss"] == ["0.799", "0.802", "+0.003", "0.002", "does NOT reproduce"]
    assert rows["accuracy/acc5"] == ["96.39", "-", "-", "0.02", "not measured"]
    assert not command.report(config, published, {}), "what is not measured is not reproduced"
