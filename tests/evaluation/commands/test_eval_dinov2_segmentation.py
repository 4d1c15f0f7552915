"""The published command line is understood as it stands, and so is ours."""

import pytest

from evaluation.commands.eval_dinov2_segmentation import (
    parse_segmentation,
    read_segmentation_arguments,
)
from utils.config.files import CONFIGS
from utils.errors import UserError

PUBLISHED = [
    "model_path=dinov2/eval/segmentation/dinov2_loader.py",
    "model_loader_kwargs.model_name=dinov2_hybrid_vith16",
    "model_loader_kwargs.weights=w's.pth",
    *("distributed=True", "ntasks_per_node=4", "account=project", "gpus-per-node=4", "nodes=1"),
    "output_dir=OUT",
]


@pytest.fixture(autouse=True)
def no_folders(monkeypatch):
    for name in ("ADE20K_PATH", "VOC_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_published_command(monkeypatch):
    monkeypatch.setenv("ADE20K_PATH", "/ade")
    monkeypatch.setenv("VOC_PATH", "/voc")
    config = parse_segmentation(PUBLISHED)
    assert config["output_dir"] == "OUT" and config["weights"] == "w's.pth"
    assert config["backbone"]["_target_"] == "octic.models.hybrid_dinov2_vit_huge_patch16"
    launcher, cluster = config["launcher"], config["cluster"]
    assert (launcher["kind"], launcher["nodes"], launcher["gpus_per_node"]) == ("slurm", 1, 4)
    assert (launcher["timeout_min"], cluster["account"]) == (500, "project")
    probes = {name: node for name, node in config["probes"].items() if node}
    assert list(probes) == ["seg_ade20k", "seg_voc2012"]
    assert probes["seg_ade20k"]["train"]["root"] == probes["seg_ade20k"]["test"]["root"] == "/ade"


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("dinov2_vitl16", "dinov2_vit_large_patch16"),
        ("dinov2_vith16_inv_early", "d8_inv_early_dinov2_vit_huge_patch16"),
        ("dinov2_hybrid_vitl16", "hybrid_dinov2_vit_large_patch16"),
    ],
)
def test_published_models(name, backbone):
    words, _ = read_segmentation_arguments(
        ["model_path=dinov2_loader.py", f"model_loader_kwargs.model_name={name}"]
    )
    assert f"backbone={backbone}" in words
    assert (CONFIGS / "backbone" / f"{backbone}.yaml").is_file()


def test_encoder_of_ones_own(tmp_path, capsys):
    file = tmp_path / "encoder.py"
    file.write_text("def __model_loader__(width, name): ...")
    words = [f"model_path={file}", "model_loader_kwargs.width=3", "model_loader_kwargs.name=x"]
    config = parse_segmentation([*words, "distributed=False", "account=a", "OUT"])
    assert config["backbone"] == {
        "_target_": "evaluation.adapters.encoder_from_file",
        "_partial_": True,
        "path": str(file),
        "arguments": {"width": 3, "name": "x"},
    }
    assert config["launcher"]["kind"] == "here"
    assert [name for name, node in config["probes"].items() if node] == ["seg_scenes"]
    said = capsys.readouterr().out
    assert "account have no effect" in said and "judging on the embedded scenes" in said


def test_a_task_of_a_file_beside_the_run_file(tmp_path):
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "mine.yaml").write_text(
        "_target_: evaluation.segmentation.probe.SegmentationProbe\nresolution: 32\n"
        "train: {_target_: utils.data.segmentation.scenes, split: train}\n"
        "test: {_target_: utils.data.segmentation.scenes, split: val}\n"
    )
    run = tmp_path / "run.yaml"
    run.write_text("# @package _global_\ndefaults: [/eval/segmentation, _self_]\n")
    config = parse_segmentation(["OUT", "--config-file", str(run), "--tasks", "mine"])
    assert {name: node["resolution"] for name, node in config["probes"].items() if node} == {
        "mine": 32
    }
    words = ["--config-file", str(run), "--tasks", "seg_scenes", "mine", "OUT"]
    both = [f"+probe@probes.{task}={task}" for task in ("seg_scenes", "mine")]
    assert read_segmentation_arguments(words)[0][:2] == both
    with pytest.raises(UserError, match=r"unknown task 'mien'; did you mean 'mine'\?"):
        read_segmentation_arguments(["--config-file", str(run), "--tasks", "mien"])
    with pytest.raises(UserError, match=r"; one of yours is probe/leaves.yaml beside the run file"):
        read_segmentation_arguments(["--tasks", "leaves"])


def test_our_own_style():
    config = parse_segmentation(
        [
            *(
                "OUT",
                "--model",
                "dinov2_vit_small_patch16",
                "--weights",
                "w.pth",
                "--device",
                "cpu",
            ),
            *("--tasks", "seg_voc2012", "--voc-root", "my voc", "--batch-size", "8"),
            *("probes.seg_voc2012.knn.distances=[L2]", "--precision", "fp32"),
        ]
    )
    probe = config["probes"]["seg_voc2012"]
    assert (config["output_dir"], config["weights"], config["device"]) == ("OUT", "w.pth", "cpu")
    assert probe["train"]["root"] == probe["test"]["root"] == "my voc"
    assert (probe["batch_size"], probe["precision"]) == (8, "fp32")
    assert probe["knn"]["distances"] == ["L2"]
    assert config["launcher"]["kind"] == "here"


def test_tasks_follow_from_folders_and_keys(monkeypatch):
    def tasks(words):
        found, _ = read_segmentation_arguments(words)
        return [word.split("=")[1] for word in found if word.startswith("+probe@")]

    assert tasks([]) == ["seg_scenes"]
    assert tasks(["--voc-root", "x"]) == ["seg_voc2012"]
    assert tasks(["probes.seg_ade20k.train.root=x"]) == ["seg_ade20k"]
    assert tasks(["--config-file", "mine.yaml"]) == []
    assert tasks(["--tasks=seg_scenes,seg_voc2012"]) == ["seg_scenes", "seg_voc2012"]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("2:00:00", 120), ("1-2", 1560), ("1-02:30", 1590)],
)
def test_times_of_sbatch(text, minutes):
    same = [f"time={text}", f"timeout={minutes}"]  # two spellings of one time agree
    words, _ = read_segmentation_arguments([*same, "mem=240G", "cpus-per-task=8"])
    assert f"launcher.timeout_min={minutes}" in words
    assert {"launcher=slurm", "cluster.mem_gb=240", "cluster.cpus_per_task=8"} <= set(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "two output folders, 'a' and 'b'"),
        (["a", "--resoluton", "64"], "^unknown flag --resoluton; did you mean '--resolution'"),
        (["a", "--voc-rot=b"], "^unknown flag --voc-rot; did you mean '--voc-root'"),
        (["--tasks"], "--tasks needs a value: seg_ade20k, "),
        (["--tasks", "seg_voc"], "unknown task 'seg_voc'; did you mean 'seg_voc2012'?"),
        (["--voc-root"], "--voc-root needs a value"),
        (["acount=x"], "unknown key 'acount'; did you mean 'account'?"),
        (["gres=gpu:4"], "unknown key 'gres'.*goes into a file configs/cluster/NAME.yaml"),
        (["distributed=yes"], "distributed is True or False, not 'yes'"),
        (
            ["ntasks_per_node=4", "gpus_per_node=2"],
            "ntasks_per_node=4 and gpus_per_node=2 disagree: there is one process per GPU",
        ),
        (["time=1:00:00", "timeout=90"], "time=1:00:00 and timeout=90 disagree$"),
        (["mem=lots"], "memory per node is written 240G"),
        (["time=soon"], "a time is minutes, H:M:S or D-H:M"),
        (["nodes=two"], "a whole number is needed"),
        (["model_loader_kwargs.weights=x"], "model_loader_kwargs without model_path"),
        (["model_path=no.py"], "model_path=no.py: no such file"),
        (
            ["model_path=dinov2_loader.py", "model_loader_kwargs.model_name=vith16"],
            "unknown model_loader_kwargs.model_name 'vith16'",
        ),
        (
            [
                "model_path=dinov2_loader.py",
                "model_loader_kwargs.model_name=dinov2_vith16",
                "model_loader_kwargs.depth=3",
            ],
            "takes model_name, weights and device, not 'depth'",
        ),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        read_segmentation_arguments(words)
    assert "\n" not in str(error.value)


def test_mistake_leaves_with_code_2(capsys):
    with pytest.raises(SystemExit) as left:
        parse_segmentation(["--task", "seg_scenes"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        parse_segmentation(["--tasks", "seg_ade20k"])
    assert "seg_ade20k needs the folder of its images: --ade20k-root DIR" in capsys.readouterr().err
