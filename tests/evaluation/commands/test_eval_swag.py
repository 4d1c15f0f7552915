"""Command lines of `imagenet_1k_eval.py` are understood as they stand, and mistakes are said."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from baselines.token_reduction.presets import METHODS
from baselines.token_reduction.swag import SWAG
from evaluation.classifier import judge_classifier
from evaluation.commands.eval_swag import OWN, PREFIXES, SIZES, parse_swag_evaluation
from evaluation.published import PUBLISHED
from tests.baselines.token_reduction.test_swag import swag_layout, tiny
from utils.config.build import build
from utils.config.signature import keywords_of

REDUCED = "baselines.token_reduction.reduced.reduced"


def test_the_published_command(tmp_path: Path, monkeypatch):
    """As the README has it; img_val as published, else an ImageNet tree."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.torch").touch()
    (tmp_path / "val").mkdir()
    words = [
        "-m",
        "hourglass_vit_l16_in1k",
        "-r",
        "512",
        "-b",
        "256",
        "-l",
        "12",
        "-n",
        "529",
        "--weights",
        "w.torch",
        "-j",
        "8",
    ]
    config = parse_swag_evaluation([*words, str(tmp_path)])
    node = config["backbone"]
    assert (node["_target_"], node["method"], node["form"]) == (REDUCED, "hourglass", "published")
    assert node["options"] == {"location": 12, "num_clusters": 529}
    assert node["backbone"]["_target_"].endswith("swag_vit_l16_in1k")
    probe = config["probes"]["accuracy"]
    assert (probe["input_size"], probe["batch_size"], probe["num_workers"]) == (512, 256, 8)
    assert probe["precision"] == "fp32" and probe["eval_crop_ratio"] == 1.0
    assert config["weights"] == "w.torch" and config["data"]["val"]["root"] == str(tmp_path)
    (tmp_path / "img_val").mkdir()
    config = parse_swag_evaluation([*words, str(tmp_path)])
    assert config["data"]["val"]["val_root"] == str(tmp_path / "img_val")


def test_the_script_takes_m_for_the_model(tmp_path: Path, monkeypatch):
    """Elsewhere -m asks for a sweep; the published flag must not be swallowed by it."""
    (tmp_path / "val" / "n01").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "n01" / "0.png")
    started = []
    monkeypatch.setattr("slurm.command.launch_all", lambda tasks, **_: started.extend(tasks))
    words = ["-m", "tome_vit_l16_in1k", "--tome_r", "8", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["eval_swag.py", *words])
    runpy.run_path("experiments/eval_swag.py", run_name="__main__")
    node = started[0].config["backbone"]
    assert (node["method"], node["options"]) == ("tome", {"r": 8})


@pytest.mark.parametrize(
    ("words", "method", "options"),
    [
        ("-m tome_vit_h14_in1k --tome_r 20", "tome", {"r": 20}),
        (
            "-m e_vit_l16_in1k --base_keep_rate 0.7 --drop_loc 6 12 18 --fuse_token",
            "evit",
            {"keep_rate": 0.7, "locations": [6, 12, 18], "fuse_token": True},
        ),
        # No default of the command line replaces those of the model's size.
        ("-m e_vit_h14_in1k --base_keep_rate 0.5", "evit", {"keep_rate": 0.5}),
        (
            "-m act_vit_l16_in1k --act_group_k False --act_q_hashes 16 --act_plug_out_index -1",
            "act",
            {"group_keys": False, "query_hashes": 16},
        ),
        (
            "-m smyrf_vit_l16_in1k --smyrf_plug_in_index 12 --smyrf_q_cluster_size 32",
            "smyrf",
            {"start": 12, "query_cluster_size": 32},
        ),
        (
            "-m ats_vit_l16_in1k --ats_blocks_indexes 16 18 --ats_drop_tokens",
            "ats",
            {"locations": [16, 18], "drop_tokens": True},
        ),
        (
            "-m evo_vit_l16_in1k --evo_prune_ratio 0.4 --evo_prune_location 18",
            "evo_vit",
            {"keep_rate": 0.4, "location": 18},
        ),
    ],
)
def test_every_method(words, method, options):
    node = parse_swag_evaluation(words.split())["backbone"]
    assert (node["method"], node["options"]) == (method, options)


def test_the_flags_are_keywords_of_the_methods():
    for own in OWN.values():
        assert own.key in keywords_of(METHODS[own.method]), own
    assert set(PREFIXES.values()) == set(METHODS)
    assert {f"swag_{name}": size.pixels for name, size in SIZES.items()} == {
        name: size["img_size"] for name, size in SWAG.items()
    }
    for name, size in SIZES.items():
        keywords = SWAG[f"swag_{name}"]
        assert (size.depth, size.patch) == (keywords["depth"], keywords["patch_size"])
        assert f"swag_{name}" in PUBLISHED


def test_the_plain_model_at_its_own_size_and_at_another():
    config = parse_swag_evaluation(["-m", "vit_h14_in1k"])
    assert config["backbone"]["img_size"] == config["probes"]["accuracy"]["input_size"] == 518
    config = parse_swag_evaluation(["-m", "vit_l16_in1k", "-r", "224", "--print-freq", "5"])
    assert config["backbone"]["img_size"] == 224


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-m hourglass_vit_l16_in1k -l 12", "needs --num_cluster"),
        ("-m hourglass_vit_l16_in1k -l 12 -n 1000", "is no square number, near it are 961 and"),
        ("-m hourglass_vit_l16_in1k -l 12 -n 1089", "more than the 1024 patches"),
        ("-m hourglass_vit_l16_in1k -n 529 -l -1", "-1: hourglass_vit_l16_in1k has blocks 0 to 23"),
        ("-m hourglass_vit_l16_in1k -n 529 -l 24", "has blocks 0 to 23"),
        ("-m vit_l16_in1k -r 500", "no multiple of the patch 16 of vit_l16_in1k; its own images"),
        ("-m hourglas_vit_l16_in1k", "did you mean 'hourglass_vit_l16_in1k'?"),
        ("-m act_vit_l16_in1k --act_group_q maybe", "--act_group_q must be true or false, got"),
        ("-m tome_vit_l16_in1k --tome_r x", "--tome_r must be a whole number, got 'x'"),
        ("-m tome_vit_l16_in1k --tome_r", "--tome_r needs a value"),
        ("-m vit_l16_in1k --tome_r 3", "a flag of tome, which -m vit_l16_in1k does not use"),
        ("-m e_vit_l16_in1k --drop_loc 8 40", "--drop_loc 40"),
        ("-m vit_l16_in1k --form exact", "published or sound"),
        ("-m vit_l16_in1k --bogus 3", "unknown flag --bogus"),
        ("--resoluton 64 here", "unknown flag --resoluton; did you mean '--resolution'"),
        ("here --tom_r 8", "unknown flag --tom_r; did you mean '--tome_r'"),
        ("-m vit_l16_in1k here there", "one folder of images"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse_swag_evaluation(words.split())
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-m e_vit_l16_in1k --base_keep_rate 1.5", "options.keep_rate must lie in (0, 1], not 1.5"),
        ("-m evo_vit_l16_in1k --evo_prune_location 0", "location 1 is the first possible"),
        ("-m smyrf_vit_l16_in1k --smyrf_q_cluster_size 0", "options.query_cluster_size must be"),
        ("-m act_vit_l16_in1k --act_q_hashes 0", "options.query_hashes must be"),
        ("-m tome_vit_l16_in1k --tome_r 20 --weights nowhere.pth", "there is no nowhere.pth"),
        ("-m vit_b16_in1k", "neither {root}/img_val nor {root}/val"),
        ("-m vit_b16_in1k --weights nowhere.pth --check", "neither {root}/img_val nor {root}/val"),
    ],
)
def test_options_and_weights_are_looked_at_before_the_images(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        parse_swag_evaluation([*words.split(), str(tmp_path)])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert said.format(root=tmp_path) in error


def test_weights_may_be_an_address_and_images_on_another_machine(tmp_path: Path):
    words = ["-m", "vit_b16_in1k", "--weights", "https://host/w.torch", str(tmp_path / "away")]
    assert parse_swag_evaluation(words)["weights"] == "https://host/w.torch"


def test_a_file_in_swags_layout_is_judged_reduced(tmp_path: Path):
    """The whole command on a small net: img_val, SWAG's keys, two methods, the figures' file."""
    net = tiny(num_classes=2, img_size=32)
    torch.save(swag_layout(net), tmp_path / "w.torch")
    for name, colour in (("n01", "red"), ("n02", "blue")):
        folder = tmp_path / "img_val" / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40 + number, 36), colour).save(folder / f"{number}.png")
    small = ["embed_dim=24", "depth=2", "num_heads=2", "mlp_ratio=2.0", "patch_size=4"]
    words = ["--weights", str(tmp_path / "w.torch"), "-b", "4", "-j", "0", "device=cpu"]
    words += ["-r", "32", str(tmp_path), f"output_dir={tmp_path}/out"]
    plain = ["-m", "vit_l16_in1k", *(f"+backbone.{word}" for word in small)]
    inner = [f"+backbone.backbone.{word}" for word in small]
    hourglass = ["-m", "hourglass_vit_l16_in1k", "-l", "1", "-n", "4", *inner]
    for model in (plain, hourglass):
        config = parse_swag_evaluation([*model, *words])
        figures = judge_classifier(config)
        assert 0 <= figures["accuracy/acc1"] <= 100
    assert (tmp_path / "out/results.json").is_file()
    wrapped = build({**config["backbone"], "_partial_": True})(num_classes=2)
    assert wrapped.num_classes == 2
