"""One command judges any classifier, and refuses weights that mean other classes."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from evaluation.classifier import judge_classifier
from evaluation.commands.eval_deit import parse_deit_evaluation, read_deit_arguments
from evaluation.probes.accuracy import AccuracyProbe
from evaluation.published import PUBLISHED, published_figure
from tests.evaluation.backbones import BACKBONES
from utils.config.build import build
from utils.data.classes import class_metadata
from utils.data.images import ImageFolder
from utils.errors import UserError
from utils.run_end import export_net

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
OCTIC = {"_target_": "octic.models.d8_inv_early_deit_small_patch16", "_partial_": True}
TIMM = {"_target_": "vit.adapters.timm_backbone", "_partial_": True}
TIMM["model_name"] = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of three colours, in a folder per colour."""
    root = tmp_path_factory.mktemp("images")
    for colour in ("blue", "green", "red"):
        (root / colour).mkdir()
        for shade in range(4):
            image = Image.new("RGB", (20, 24), colour)
            image.putpixel((3 * shade, shade), (255, 255, 255))
            image.save(root / colour / f"{shade}.png")
    return root


def config(images, folder, backbone, weights=None, **probe):
    probe = {"_target_": "evaluation.probes.accuracy.AccuracyProbe", **probe}
    data = {"val": {"_target_": "utils.data.images.ImageFolder", "root": str(images)}}
    return {
        "output_dir": str(folder),
        "backbone": backbone,
        "weights": None if weights is None else str(weights),
        "seed": 0,
        "device": "cpu",
        "data": data,
        "probes": {"knn": None, "accuracy": probe},
    }


def export(path, backbone, images, **overrides):
    """A file as a run leaves it."""
    torch.manual_seed(3)
    net = build({**backbone, **SIZES, "num_classes": 3})()
    metadata = {"constructor": json.dumps({**backbone, **SIZES, "num_classes": 3})}
    metadata |= class_metadata(ImageFolder(images)) | overrides
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: v.contiguous() for name, v in net.state_dict().items()}, path, metadata)
    return path


@pytest.mark.parametrize("backbone", [OCTIC, TIMM], ids=["octic", "timm"])
def test_a_file_of_ours_brings_its_net(backbone, images, tmp_path, capsys):
    """Sizes and classes come from the file; a run folder stands for what it exported."""
    export(tmp_path / "run/exported/model.safetensors", backbone, images)
    found = judge_classifier(config(images, tmp_path, backbone, tmp_path / "run", symmetries=True))
    printed = capsys.readouterr().out
    assert f"* Acc@1 {found['accuracy/acc1']:.3f}" in printed and "published" not in printed
    changed = sum(value for key, value in found.items() if key.endswith("_changed"))
    assert changed == 0 or backbone is TIMM
    results = json.loads((tmp_path / "results.json").read_text())["accuracy"]
    assert results["figures"]["acc1"] == found["accuracy/acc1"]
    assert results["protocol"]["weights"].endswith("model.safetensors")


def test_other_peoples_files(images, tmp_path):
    """The number of classes of a timm file is read off its head."""
    options = {**SIZES, "num_classes": 3}
    net = timm.create_model("vit_tiny_patch16_224", **options)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    backbone = {**TIMM, **SIZES}
    found = judge_classifier(config(images, tmp_path, backbone, tmp_path / "w.pth"))
    assert 0 <= found["accuracy/acc1"] <= 100
    cnn = timm.create_model("resnet10t", num_classes=3)
    torch.save(cnn.state_dict(), tmp_path / "cnn.pth")
    backbone = {**TIMM, "model_name": "resnet10t"}
    judge_classifier(config(images, tmp_path, backbone, tmp_path / "cnn.pth", input_size=64))


def test_torchvisions_classifiers(images, tmp_path):
    """By the number of classes that the file has, at the size the net was built for."""
    node = BACKBONES["torchvision"]
    net = build({**node, "num_classes": 3})()
    torch.save(net.net.state_dict(), tmp_path / "w.pth")
    found = judge_classifier(config(images, tmp_path, node, tmp_path / "w.pth"))
    assert 0 <= found["accuracy/acc1"] <= 100


def test_published_invariant_files_bring_their_invariantization(images, tmp_path):
    """The released files hold polynomials, whatever the model was built with."""
    options = {**SIZES, "num_classes": 3, "invariant": "polynomial"}
    net = build({**OCTIC, **options})()
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in net.state_dict().items()}},
               tmp_path / "w.pth")  # fmt: skip
    judge_classifier(config(images, tmp_path, {**OCTIC, **SIZES}, tmp_path / "w.pth"))


def test_another_order_of_classes_is_refused(images, tmp_path):
    file = export(tmp_path / "w.safetensors", OCTIC, images)
    for old, new in (("green", "zebra"), ("red", "azure")):
        other = tmp_path / new
        other.mkdir()
        for folder in images.iterdir():
            (other / (new if folder.name == old else folder.name)).symlink_to(folder)
        with pytest.raises(UserError, match="class . was '.*' in training and is '.*' in") as error:
            judge_classifier(config(other, tmp_path, OCTIC, file))
        assert "\n" not in str(error.value)
    fewer = tmp_path / "fewer"
    (fewer / "red").mkdir(parents=True)
    (fewer / "red" / "a.png").symlink_to(images / "red" / "0.png")
    with pytest.raises(UserError, match="3 classes were trained, 1 in ImageFolder"):
        judge_classifier(config(fewer, tmp_path, OCTIC, file))


def test_wrong_files_are_one_line(images, tmp_path):
    file = export(tmp_path / "w.safetensors", OCTIC, images, constructor="{}")
    with pytest.raises(UserError, match="w.safetensors: the weights do not fit .* shape") as error:
        judge_classifier(config(images, tmp_path, OCTIC, file))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such weights file"):
        judge_classifier(config(images, tmp_path, OCTIC, tmp_path / "nothing.pth"))
    with pytest.raises(UserError, match="the run is not finished"):
        judge_classifier(config(images, tmp_path, OCTIC, tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").touch()
    with pytest.raises(UserError, match="hub is no run folder; give .*/hub/model.safetensors$"):
        judge_classifier(config(images, tmp_path, OCTIC, tmp_path / "hub"))
    headless = {**OCTIC, **SIZES, "num_classes": 0}
    with pytest.raises(UserError, match="d8_inv_early_deit_small_patch16 has no classifier"):
        judge_classifier(config(images, tmp_path, headless))


def test_published_figures_stand_beside_theirs():
    figure = published_figure(
        "hybrid_deit_huge_patch14", exported_by_us=False, num_images=50_000, num_classes=1000
    )
    assert figure and str(figure).startswith(
        "published: Acc@1 84.996 Acc@5 96.39 loss 0.799 (octic-vits"
    )
    assert str(figure).endswith(", fp16)")  # in which the authors judged
    for other in ({"exported_by_us": True}, {"num_images": 49_999}, {"num_classes": 10}):
        options = {"exported_by_us": False, "num_images": 50_000, "num_classes": 1000, **other}
        assert published_figure("hybrid_deit_huge_patch14", **options) is None
    from timm import is_model

    import baselines.token_reduction.swag  # noqa: F401  # registers the models
    import octic.models  # noqa: F401

    assert all(is_model(name) for name in PUBLISHED)


def test_published_command(monkeypatch):
    monkeypatch.delenv("IMAGENET_PATH", raising=False)
    config = parse_deit_evaluation(
        [
            *("--model", "hybrid_deit_huge_patch14", "--eval", "w's.pth", "--data-path", "in"),
            *("--rot-eval", "--flop-eval", "--input-size=192", "--eval-crop-ratio", "0.875"),
            *("--batch-size", "32", "--dist-eval"),
        ]
    )
    assert config["backbone"]["_target_"] == "octic.models.hybrid_deit_huge_patch14"
    assert config["weights"] == "w's.pth"
    assert config["data"]["val"]["_target_"] == "utils.data.imagenet.ImageNetTree"
    assert config["data"]["val"]["root"] == "in"
    probe = config["probes"]["accuracy"]
    assert (probe["rot_eval"], probe["flop_eval"], probe["symmetries"]) == (True, True, False)
    assert (probe["input_size"], probe["eval_crop_ratio"], probe["batch_size"]) == (192, 0.875, 32)
    assert config["probes"]["knn"] is None


@pytest.mark.parametrize(
    "words",
    [
        "--eval --resume w.pth --model deit_small_patch16_LS",
        "--model deit_small_patch16_LS --resume w.pth --data-path in --eval",
        "--model deit_small_patch16_LS --resume=w.pth --eval device=cpu",
        "--eval w.pth --model deit_small_patch16_LS --fused-attn --compile",
    ],
)
def test_the_weights_are_named_as_either_code_names_them(words):
    config = parse_deit_evaluation(words.split())
    assert config["weights"] == "w.pth" and config["backbone_named"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("defaults: [/eval/deit, override /data: digits, _self_]", False),
        ("defaults: [/eval/deit, override /backbone: deit_small_patch16_LS, _self_]", True),
    ],
)
def test_the_net_that_the_command_begins_with_is_no_choice_of_a_file_built_on_it(
    text, named, tmp_path
):
    """So that the weights say which net they are of."""
    file = tmp_path / "run.yaml"
    file.write_text(f"# @package _global_\n{text}")
    assert parse_deit_evaluation(["--config-file", str(file)])["backbone_named"] is named
    assert not parse_deit_evaluation(["--config-file", "eval/deit"])["backbone_named"]


def test_flags_of_training_and_judging():
    words = "--no-use-amp --symmetrized-asym-feats --attn-mixer --data-set IMNET --use-lmdb"
    config = parse_deit_evaluation(f"--model d2_deit_tiny_patch16_LS {words}".split())
    assert config["probes"]["accuracy"]["precision"] == "fp32"
    assert config["backbone"]["invariant"] == "power_spectrum"
    assert config["backbone"]["attention_mixer"] is True
    assert config["data"]["val"]["_target_"] == "utils.data.lmdb.LmdbImages"
    config = parse_deit_evaluation(["--data-set", "INAT", "--inat-category", "family"])
    assert config["data"]["val"]["category"] == "family"


def test_every_model_has_a_folder_of_its_own():
    named = ["--model", "deit_small_patch16_LS"]
    found = [
        parse_deit_evaluation(words)["output_dir"]
        for words in ([], named, [*named, "--output-dir", "x"], [*named, "name=y"])
    ]
    assert found == ["runs/eval_deit", "runs/eval_deit/deit_small_patch16_LS", "x", "runs/y"]


@pytest.mark.parametrize(
    ("weights", "folder"),
    [
        ("runs/mine", "mine"),
        ("runs/mine/", "mine"),
        ("runs/mine/exported/model.safetensors", "mine"),
        ("best v1.5.pth", "best_v1.5"),
    ],
)
def test_every_file_of_weights_has_a_folder_of_its_own(weights, folder):
    """Where no model is named; else one run's results would take the place of another's."""
    found = parse_deit_evaluation(["--eval", weights])
    assert found["output_dir"] == f"runs/eval_deit/{folder}"
    named = parse_deit_evaluation(["--eval", weights, "--model", "deit_small_patch16_LS"])
    assert named["output_dir"] == "runs/eval_deit/deit_small_patch16_LS"


def test_timm_models_and_other_data():
    config = parse_deit_evaluation(["--model", "deit3_small_patch16_224", "--data-set", "INAT19"])
    assert config["backbone"]["model_name"] == "deit3_small_patch16_224"
    assert config["data"]["val"]["year"] == 2019


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval"], "--eval needs a value: file of weights"),
        (["--eval", "--rot-eval"], "--eval needs a value"),
        (["--resume", "--eval"], "--eval needs a value"),
        (["--data-set", "INET"], "unknown --data-set 'INET'; did you mean 'IMNET'?"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        read_deit_arguments(words)


def test_a_run_file_without_the_accuracy_is_refused(tmp_path, capsys):
    """It would probe features instead, and say nothing of the classifier."""
    (tmp_path / "mine.yaml").write_text("defaults: [/evaluate, _self_]")
    with pytest.raises(SystemExit):
        parse_deit_evaluation(["--config-file", str(tmp_path / "mine.yaml"), "data=digits"])
    assert (
        "no probes.accuracy: its `defaults` must begin with /eval/deit" in capsys.readouterr().err
    )


def test_unknown_model_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        parse_deit_evaluation(["--model", "hybrid_deit_hug_patch14"])
    assert left.value.code == 2
    assert "did you mean 'hybrid_deit_huge_patch14'?" in capsys.readouterr().err


def test_what_a_run_leaves_is_judged_and_guarded(images, tmp_path):
    """The loop writes constructor and classes beside the weights; the evaluation reads them."""
    backbone = {**OCTIC, **SIZES, "num_classes": 3}
    run = SimpleNamespace(
        folder=tmp_path,
        config={"backbone": backbone},
        recipe=SimpleNamespace(exported=build(backbone)()),
        data={"train": ImageFolder(images)},
    )
    export_net(run, 1)
    judge_classifier(config(images, tmp_path, OCTIC, tmp_path))
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for folder in images.iterdir():
        (renamed / f"my_{folder.name}").symlink_to(folder)
    with pytest.raises(UserError, match="class 0 was 'blue' in training and is 'my_blue'"):
        judge_classifier(config(renamed, tmp_path, OCTIC, tmp_path))


def test_without_a_model_the_files_own_is_judged(images, tmp_path, capsys):
    export(tmp_path / "run/exported/model.safetensors", OCTIC, images)
    words = ["--eval", str(tmp_path / "run"), f"output_dir={tmp_path}/out", "device=cpu"]
    parsed = parse_deit_evaluation(words)
    asked = config(images, tmp_path, parsed["backbone"], tmp_path / "run")
    judge_classifier(asked | {"backbone_named": parsed["backbone_named"]})
    out = capsys.readouterr().out
    assert "no --model was given" in out and "d8_inv_early_deit_small_patch16, weights: " in out


def test_a_probe_that_the_net_cannot_serve_is_refused_before_the_others_run(
    images, tmp_path, monkeypatch
):
    run = export(tmp_path / "run/exported/model.safetensors", OCTIC, images)
    asked = config(images, tmp_path / "out", OCTIC, run)
    asked["probes"]["token_mask"] = {"_target_": "evaluation.pictures.token_mask.TokenMaskProbe"}
    monkeypatch.setattr(AccuracyProbe, "__call__", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match="does not tell which patches it keeps"):
        judge_classifier(asked)


class Splits:
    """Answers with the sizes of what it is given."""

    def __call__(self, net, data, output_dir, step):
        return {split: len(images) for split, images in data.items()}


def test_a_probe_that_trains_is_given_its_images(images, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "tests")
    asked = config(images, tmp_path, {**OCTIC, **SIZES})
    asked["probes"] = {"mine": {"_target_": f"{__name__}.Splits"}}
    with pytest.raises(UserError, match=r"data\.train is missing"):
        judge_classifier(asked)
    asked["data"]["train"] = asked["data"]["val"]
    assert judge_classifier(asked) == {"mine/train": 12, "mine/val": 12}
