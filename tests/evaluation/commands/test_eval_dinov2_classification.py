"""The command line of DINOv2's classification evaluation is understood as it stands."""

import sys

import pytest

from evaluation.commands.eval_dinov2_classification import (
    IGNORED,
    OPTIONS,
    SWITCHES,
    WITHOUT_VALUE,
    parse_evaluation,
    read_evaluation_arguments,
)
from utils.config.compose import compose_config
from utils.config.files import CONFIGS
from utils.errors import UserError

PUBLISHED = [
    *("OUT", "--config-file", "configs/eval/hybrid_vith16.yaml"),
    *("--pretrained-weights", "w's.pth", "--gather-on-cpu"),
    *("--train-dataset", "ImageNet:split=TRAIN:root=a"),
    *("--val-dataset", "ImageNet:split=VAL:root=a"),
    *("--nb_knn", "5", "50", "--temperature", "0.1", "--batch-size", "32"),
    *("--n-per-class-list", "-1", "5", "--n-tries", "3"),
    *("--opts", "backbone.img_size=98"),
]


def test_published_command():
    config = parse_evaluation(PUBLISHED)
    knn = config["probes"]["knn"]
    assert config["output_dir"] == "OUT"
    assert config["weights"] == "w's.pth"
    assert config["backbone"]["_target_"] == "octic.models.hybrid_dinov2_vit_huge_patch16"
    assert config["backbone"]["img_size"] == 98
    assert (knn["ks"], knn["temperature"], knn["batch_size"]) == ([5, 50], 0.1, 32)
    assert (knn["n_per_class_list"], knn["num_tries"]) == ([-1, 5], 3)
    assert config["data"]["val"] == {
        "_target_": "utils.data.strings.parse_dataset",
        "string": "ImageNet:split=VAL:root=a",
    }


PUBLISHED_LINEAR = [
    *("OUT", "--config-file", "configs/eval/hybrid_vith16.yaml"),
    *("--epochs", "5", "--epoch-length", "100", "--learning-rates", "1e-5", "0.1"),
    *("--save-checkpoint-frequency", "20", "--eval-period-iterations", "50", "--no-resume"),
    *("--val-metric-type", "mean_per_class_accuracy", "--val-class-mapping-fpath", "None"),
    *("--test-datasets", "ImageNet:split=VAL:root=a", "ImageNet:split=VAL:root=b"),
    *("--test-metric-types", "mean_accuracy", "per_class_accuracy"),
    *("--test-class-mapping-fpaths", "None", "it's.npy"),
    *("--classifier-fpath", "model_final.pth", "--batch-size", "64", "--num-workers", "2"),
    *("--precision", "bf16"),
]


def with_probe(name, words):
    """The words, with a probe switched on where the default config leaves it out."""
    content = (CONFIGS / "evaluate.yaml").read_text()
    on = f"probes.{name}: {name}" in content
    return [*words, *([] if on else [f"+probe@probes.{name}={name}"])]


def test_published_command_of_the_linear_probe(capsys):
    probes = parse_evaluation(with_probe("linear", PUBLISHED_LINEAR))["probes"]
    linear = probes["linear"]
    assert (linear["epochs"], linear["epoch_length"], linear["eval_period"]) == (5, 100, 50)
    assert linear["learning_rates"] == [1e-5, 0.1]
    assert linear["val_metric_type"] == "mean_per_class_accuracy"
    assert linear["val_class_mapping"] is None
    assert [node["string"][-1] for node in linear["test_datasets"]] == ["a", "b"]
    assert linear["test_datasets"][0]["_target_"] == "utils.data.strings.parse_dataset"
    assert linear["test_metric_types"] == ["mean_accuracy", "per_class_accuracy"]
    assert linear["test_class_mappings"] == [None, "it's.npy"]
    assert linear["classifier"] == "model_final.pth"
    assert linear["resume"] is False
    for probe in (linear, probes["knn"]):
        assert (probe["batch_size"], probe["num_workers"]) == (64, 2)
        assert probe["precision"] == "bf16"
    assert "resume" not in probes["knn"]
    assert "--save-checkpoint-frequency has no effect" in capsys.readouterr().out


def test_a_probe_that_is_off_leaves_its_flags_without_effect(capsys):
    config = parse_evaluation(
        [*with_probe("linear", ["OUT"]), "probes.linear=null", "--epochs", "3"]
    )
    assert not config["probes"]["linear"]
    printed = capsys.readouterr().out
    assert "--epochs has no effect: no probe of this evaluation is called linear" in printed


def test_a_spelt_out_key_has_the_last_word():
    config = parse_evaluation(["probes.knn.batch_size=7", "--batch-size", "9"])
    assert config["probes"]["knn"]["batch_size"] == 7


def test_flags_of_logistic_regression():
    words = ["--finetune-on-val", "--max-train-iters", "50", "--train-features-device", "cuda"]
    logreg = parse_evaluation(with_probe("logreg", words))["probes"]["logreg"]
    assert (logreg["select_on"], logreg["max_iter"]) == ("val", 50)
    assert logreg["features_on"] == "device"
    words = ["--metric-type", "mean_per_class_accuracy"]
    logreg = parse_evaluation(with_probe("logreg", words))["probes"]["logreg"]
    assert logreg["metric_type"] == "mean_per_class_accuracy"


def test_our_own_style(capsys):
    words = ["backbone=timm", "backbone.model_name=vit_tiny_patch16_224", "probes.knn.ks=[7]"]
    config = parse_evaluation([*words, "output_dir=x", "--device", "cpu"])
    assert config["backbone"]["_target_"] == "vit.adapters.timm_backbone"
    assert config["probes"]["knn"]["ks"] == [7]
    assert config["device"] == "cpu"


def test_the_seed_of_every_probe_is_the_runs_unless_set():
    tasks = sorted(path.stem for path in (CONFIGS / "probe").glob("*.yaml"))
    seeded = [
        name for name in tasks if "\nseed:" in (CONFIGS / "probe" / f"{name}.yaml").read_text()
    ]
    assert {"linear", "attentive", "seg_scenes", "seg_linear_scenes"} < set(seeded)
    added = [f"+probe@probes.{name}={name}" for name in seeded if name != "linear"]
    for seed in (0, 3):
        probes = parse_evaluation([*added, "--seed", str(seed)])["probes"]
        assert {probes[name]["seed"] for name in seeded} == {seed}
    probes = parse_evaluation([*added, "--seed", "3", "probes.linear.seed=5"])["probes"]
    assert (probes["linear"]["seed"], probes["attentive"]["seed"]) == (5, 3)
    assert compose_config("dinov2/quickstart.yaml")["probes"].linear.seed == 0


def test_a_model_is_ours_or_timms_and_a_config_file_names_one_too():
    assert not parse_evaluation(["OUT"])["backbone_named"]
    assert parse_evaluation(PUBLISHED)["backbone_named"]
    config = parse_evaluation(["OUT", "--model", "vit_tiny_patch16_224"])
    assert config["backbone_named"] and config["backbone"]["model_name"] == "vit_tiny_patch16_224"


OWN_PROBES = "defaults: [/evaluate, _self_]"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (OWN_PROBES, False),
        ("defaults: [/eval/vith16, _self_]", True),
        ("defaults: [/evaluate, override /backbone: dinov2_vit_small_patch16, _self_]", True),
        ("defaults: [/evaluate, /parts/no_backbone, /backbone/dinov2_vit_small_patch16]", True),
        (f"{OWN_PROBES}\nbackbone: {{img_size: 32}}", True),
        ("student: {arch: vit_small}", True),
    ],
)
def test_a_config_file_names_the_net_that_it_chooses(text, named, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert parse_evaluation(["OUT", "--config-file", str(file)])["backbone_named"] is named
    file = tmp_path / "further.yaml"  # built on the first
    file.write_text("defaults: [run, _self_]" if text.startswith("defaults") else text)
    assert parse_evaluation(["OUT", "--config", str(file)])["backbone_named"] is named


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "two output folders, 'a' and 'b'"),
        (["--nb_knn", "ten"], "--nb_knn takes int, not 'ten'"),
        (["--temperature"], "--temperature needs a value"),
        (["--model"], "--model needs a value"),
        (["--pretrained-weights", "--nb_knn", "10"], "--pretrained-weights needs a value"),
        (["--model", "--nb_knn", "10"], "--model needs a value"),
        (["--model", "swagg"], "--model: there is no model 'swagg', .* one of swag_vit_b16_in1k, "),
        (["--learning-rates", "fast"], "--learning-rates takes float, not 'fast'"),
        (["--save-checkpoint-frequency"], "--save-checkpoint-frequency needs a value"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        read_evaluation_arguments(words)


@pytest.mark.parametrize("before", [[], ["OUT"]], ids=["first", "after the folder"])
@pytest.mark.parametrize(
    ("word", "meant"), [("--temprature", "temperature"), ("--precison", "precision")]
)
def test_a_misspelt_flag_is_what_is_wrong(before, word, meant):
    """Not its value, which would be one more folder; the flags of this command are known."""
    with pytest.raises(UserError, match=f"^unknown flag {word}; did you mean '--{meant}'"):
        read_evaluation_arguments([*before, word, "0.1"])


def test_mistake_leaves_with_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        parse_evaluation(["--nb_kn", "10"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_names_the_flags(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_dinov2_classification.py", "--help"])
    with pytest.raises(SystemExit) as left:
        parse_evaluation()
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for flag in (*OPTIONS, *SWITCHES, *WITHOUT_VALUE, *IGNORED, "--config-file"):
        assert flag in printed


def test_probes_by_name(tmp_path, capsys):
    """--probes leaves those named; flags then reach them alone."""
    config = parse_evaluation([str(tmp_path), "--probes", "logreg,knn", "--batch-size", "8"])
    chosen = {name: node for name, node in config["probes"].items() if node}
    assert set(chosen) == {"logreg", "knn"}
    assert {node["batch_size"] for node in chosen.values()} == {8}
    with pytest.raises(SystemExit):
        parse_evaluation(["--probes=linar"])
    assert "got 'linar'; did you mean 'linear'?" in capsys.readouterr().err


def test_a_probe_beside_the_run_file_is_chosen_by_name(tmp_path):
    (tmp_path / "run.yaml").write_text("defaults: [/evaluate, _self_]")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/mine.yaml").write_text((CONFIGS / "probe/knn.yaml").read_text())
    file = str(tmp_path / "run.yaml")
    config = parse_evaluation(["--probes", "mine", "--config-file", file, "probes.mine.ks=[3]"])
    assert {name: node["ks"] for name, node in config["probes"].items() if node} == {"mine": [3]}


def test_the_file_of_a_training_is_refused_with_what_to_give_instead(capsys):
    with pytest.raises(SystemExit):
        parse_evaluation(["--config-file", "configs/dinov2/quickstart.yaml", "--weights", "run"])
    assert "describes a training" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word",
    [
        "+probes.mine={_target_:evaluation.probes.knn.KNN}",
        "+probes.mine._target_=evaluation.probes.knn.KNN",
        "+probe@probes.mine=knn",
    ],
)
def test_a_probe_that_the_command_line_adds_can_be_chosen(word):
    config = parse_evaluation([word, "--probes", "mine"])
    assert [name for name, node in config["probes"].items() if node] == ["mine"]
