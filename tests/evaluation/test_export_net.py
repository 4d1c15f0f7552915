"""The export command: from a config or a run folder to a file that was compared with the net."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evaluation import export_net as command
from evaluation.commands.export import parse_export, read_export_arguments
from evaluation.export_net import export_net
from evaluation.image_size import image_size_of
from evaluation.nets import has_classes
from tests.evaluation.backbones import BACKBONES, any_backbone, make
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NODE = {
    "_target_": "octic.models.hybrid_deit_small_patch16",
    **{"_partial_": True, "img_size": 32, "patch_size": 8, "embed_dim": 64},
    **{"depth": 2, "num_heads": 2, "num_classes": 5},
}


def config(folder: Path, **more: object) -> dict[str, object]:
    keys = {"backbone": None, "weights": None, "seed": 0, "format": "hub", "output": "auto"}
    return {**keys, "size": None, "push": None, "output_dir": str(folder), **more}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a training exports: weights that say what they are of."""
    path = tmp_path / "run" / "exported" / "model.safetensors"
    path.parent.mkdir(parents=True)
    metadata = {"constructor": json.dumps(NODE), "class_names": json.dumps(list("abcde"))}
    save_file(make(NODE, seed=3).state_dict(), path, metadata)
    return tmp_path / "run"


def test_a_run_says_its_net_and_its_classes(run_folder: Path, tmp_path: Path, capsys) -> None:
    done = export_net(config(tmp_path / "out", weights=str(run_folder)))
    assert done == {"path": str(tmp_path / "out"), "difference": 0.0}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["label_names"] == list("abcde") and written["model_args"]["embed_dim"] == 64
    assert "largest difference 0.0e+00" in capsys.readouterr().out


def test_a_file_where_the_folder_should_be_is_refused(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match=f"^output_dir: cannot make {tmp_path / 'out'}: it is a f"):
        export_net(config(tmp_path / "out", weights=str(run_folder)))


def test_a_folder_of_the_hub_is_a_backbone_with_the_same_features(
    run_folder: Path, tmp_path: Path
) -> None:
    export_net(config(tmp_path / "out", weights=str(run_folder)))
    node = {"_target_": "vit.adapters.timm_backbone", "model_name": f"local-dir:{tmp_path / 'out'}"}
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = make(NODE, seed=3).features(images)[0], make(node).features(images)[0]
    torch.testing.assert_close(theirs.cls, ours.cls, rtol=0, atol=0)
    again = export_net(config(tmp_path / "again", backbone=node))
    assert again["difference"] == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_classes"] == 5


@pytest.mark.slow
def test_a_folder_of_another_packages_net_is_a_backbone_in_a_new_process(tmp_path: Path) -> None:
    """Where nothing has imported the package yet."""
    node = {"_target_": "baselines.gevit.models.gevit_digits_p4m", "_partial_": True}
    export_net(config(tmp_path / "out", backbone={**node, "img_size": 32}))
    node = {"_target_": "vit.adapters.timm_backbone", "model_name": f"local-dir:{tmp_path / 'out'}"}
    code = f"from utils.config.build import build; print(type(build({node!r}).net).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "GEViT\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
def test_programs_are_written_and_compared(
    run_folder: Path, tmp_path: Path, kind: str, capsys
) -> None:
    if kind == "onnx":
        for package in command.ONNX_PACKAGES:
            pytest.importorskip(package)
    done = export_net(config(tmp_path, weights=str(run_folder), format=kind, size=48))
    assert done["difference"] < 1e-4 and Path(done["path"]).name == command.FILES[kind]
    said = capsys.readouterr().out
    assert "logits at 48 x 48 pixels" in said and "images [batch, 3, 48, 48]" in said


def test_success_is_not_reported_beyond_the_tolerance(
    run_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(command.hub, "largest_difference", lambda *_: 2e-4)
    with pytest.raises(UserError, match="does not compute what the net does: largest difference 2"):
        export_net(config(tmp_path / "out", weights=str(run_folder)))
    monkeypatch.setattr(command.hub, "largest_difference", lambda *_: float("nan"))
    with pytest.raises(UserError, match="does not compute"):
        export_net(config(tmp_path / "out", weights=str(run_folder)))


def test_mistakes_are_one_line(run_folder: Path, tmp_path: Path, monkeypatch) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    cases = [
        (config(tmp_path, weights=str(bare)), "does not say which net it is of; give --model NAME"),
        (config(tmp_path, weights="nowhere.pth", backbone=NODE), "no such weights file"),
        (config(tmp_path, weights="nowhere.pth"), "no such weights file"),
        (config(tmp_path, weights=str(bare), backbone=NODE), "missing: "),
        (config(tmp_path, backbone=BACKBONES["torchvision"]), "not registered with timm"),
    ]
    for node, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            export_net(node)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(command, "ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match="ONNX needs no_such_package: pip install"):
        export_net(config(tmp_path, backbone=NODE, format="onnx"))


@any_backbone
def test_a_net_knows_its_size_and_whether_it_has_classes(backbone: dict) -> None:
    net = make(backbone)
    assert image_size_of(net) == 32
    assert has_classes(net) == (backbone is BACKBONES["torchvision"])


def test_flags_are_keys() -> None:
    words = read_export_arguments(["out", "--weights", "a b", "--size=64", "seed=1", "--name", "n"])
    assert words == ["weights='a b'", "size=64", "seed=1", "--name", "n", "output_dir='out'"]
    words = read_export_arguments(["--model", "local-dir:x", "--input-size", "64"])
    assert words == ["backbone=timm", "backbone.model_name='local-dir:x'", "size=64"]
    parsed = parse_export(["out", "--weights", "w.pth", "--format", "onnx"])
    assert (parsed["backbone"], parsed["format"], parsed["output_dir"]) == (None, "onnx", "out")
    assert parse_export(["--model", "vit_tiny_patch16_224"])["backbone"]["model_name"]


def test_a_config_file_or_a_target_names_the_net(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("defaults: [export.yaml, {override backbone: deit_small_patch16_LS}, _self_]\n")
    given = ["--config-file", str(file)], [f"--config-file={file}"]
    targets = [parse_export(["out", *words])["backbone"]["_target_"] for words in given]
    assert targets == ["vit.models.deit_small_patch16_LS"] * 2
    target = "backbone._target_=octic.models.hybrid_deit_small_patch16"
    assert parse_export(["out", target])["backbone"]["_target_"] in target


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which net? give --model NAME"),
        (
            ["--weights", "w", "backbone.depth=3"],
            "backbone.depth=3 changes a net that is",
        ),
        (["a", "b"], "two output folders"),
        (["--format"], "--format needs a value: torch_export, onnx or hub"),
        (
            ["--model", "deit_small_patch16_LS", "--format", "onx"],
            "hub, not 'onx'; did you mean 'onnx'",
        ),
        (["--model", "deit_small_patch16_LS", "--push", "a/b"], "add --format hub"),
        (["--model", "deit_small_patch16_LS", "--size", "-4"], "size must be a whole number"),
        (["--model", "deit_smal_patch16_LS"], "did you mean 'deit_small_patch16_LS'?"),
    ],
)
def test_a_wrong_word_is_one_line_and_code_2(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        parse_export(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_channels_of_the_input_are_told(tmp_path: Path, capsys) -> None:
    export_net(config(tmp_path, backbone=NODE | {"in_chans": 5}, format="torch_export"))
    assert "images [batch, 5, 32, 32], as in training" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["name", "a user/name"])
def test_a_bad_name_to_push_to_is_told_before_anything_is_written(name: str, tmp_path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="it is spelt user/name"):
        export_net(config(folder, backbone=NODE, push=name))
    assert not folder.exists()
