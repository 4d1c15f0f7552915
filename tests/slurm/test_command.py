"""-m, --then and --dry-run, without a Slurm."""

import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slurm import record
from slurm.command import NO_LIST, ROOT, capture, main
from slurm.task import Task
from utils.config.build import plain
from utils.config.compose import parse_config
from utils.errors import UserError

parse = partial(parse_config, "dinov2/quickstart.yaml")
MARK = "tests.slurm.work.mark"


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    script = tmp_path / "judge.py"
    script.write_text(
        "from functools import partial\n"
        "from slurm.command import main\n"
        "from utils.config.compose import parse_config\n"
        "main('tests.slurm.work.mark', partial(parse_config, 'evaluate.yaml', base='evaluate'))\n"
    )
    return script


@pytest.fixture
def started(monkeypatch) -> list[Any]:
    """What would be launched, caught."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "slurm.command.launch_all", lambda tasks, **more: seen.append((tasks, more))
    )
    return seen


@pytest.mark.slow
def test_one_failing_point_does_not_stop_the_others(tmp_path: Path, capfd, judge: Path) -> None:
    words = ["-m", "seed=0,1,2", "--output-dir", str(tmp_path / "sweep")]
    with pytest.raises(SystemExit) as left:
        main(MARK, parse, [*words, "--then", str(judge)])
    assert left.value.code == 1
    told = capfd.readouterr()
    assert "error: 4 of 6 did not succeed" in told.err
    for seed in range(3):
        folder = tmp_path / "sweep" / f"seed={seed}"
        assert (folder / "mark.txt").read_text().startswith(f"{seed} ")
        assert (folder / "judge" / "mark.txt").exists() == (seed == 0)
    assert "failed, code 1: RuntimeError: seed 1 brings no luck" in " ".join(told.out.split())
    assert "failed, code 137" in told.out and told.out.count("succeeded") == 2
    assert told.out.count("not started") == 2
    events = [line["event"] for line in record.read(tmp_path / "sweep" / "seed=1")]
    assert events == ["began", "failed"]


def test_what_follows_takes_what_it_leaves_open_from_the_run(
    tmp_path: Path, started: list[Any], judge: Path
) -> None:
    run = tmp_path / "run"
    words = ["--output-dir", str(run), "launcher=local", "backbone.depth=2", "device=cpu"]
    more = f"{judge} --output-dir {{run}}/mine weights=my.pth backbone=dinov2_vit_small_patch16"
    main(MARK, parse, [*words, "--then", str(judge), "--then", more])
    ((task,), _), *_ = started
    first, second = (then.config for then in task.then)
    assert first["output_dir"] == f"{run}/judge"
    assert first["weights"] == f"{run}/exported/model.safetensors"
    assert first["backbone"] == task.config["backbone"] and first["data"] == task.config["data"]
    assert first["launcher"]["kind"] == "local" and first["device"] == "cpu"
    assert second["output_dir"] == f"{run}/mine" and second["weights"] == "my.pth"
    assert second["backbone"] != task.config["backbone"]


def test_what_follows_a_run_without_a_network_needs_weights(
    tmp_path: Path, capsys, started: list[Any], judge: Path
) -> None:
    def bare(words: list[str]) -> dict[str, Any]:
        lacks = ("backbone", "data", "device")
        return {key: value for key, value in plain(parse(words)).items() if key not in lacks}

    words = ["--output-dir", str(tmp_path / "run"), "--then"]
    with pytest.raises(SystemExit):
        main(MARK, bare, [*words, str(judge)])
    assert "leaves no network to follow it with: give weights=" in capsys.readouterr().err
    main(MARK, bare, [*words, f"{judge} weights=my.pth"])
    ((task,), _), *_ = started
    assert task.then[0].config["weights"] == "my.pth"


def test_a_script_that_hands_on_its_outcome_is_captured() -> None:
    assert capture(ROOT / "experiments" / "reproduce.py")[0] == "evaluation.reproduce.reproduce"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--then"], "--then needs a command"),
        (["--then", "experiments/eval_diet.py"], "did you mean 'experiments/eval_deit.py'?"),
        (["--then", "experiments/plan_probes.py"], "starts nothing that could follow a run"),
        (
            ["--then", "experiments/eval_deit.py data.rot=x"],
            "--then 'experiments/eval_deit.py data",
        ),
        (["--then", "experiments/eval_deit.py 'x"], "'x\": No closing quotation"),
        (["-m", "seed=1,2", "recipe.epohs=1"], "error: seed=1: recipe: DINOv2 takes no 'epohs'"),
        (["-m", "seed=1,2", "sed=1"], "error: seed=1: unknown key 'sed'; did you mean 'seed'?"),
        (["seed=1,2"], "gives several values: -m tries one after another"),
        (["-m", "seed=1,2", "cluster.mem_gb=1,2", "--nodes", "2"], "cannot be swept"),
        (["-m", "launcher=here,local"], "need one launcher"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(
    tmp_path: Path, capsys, monkeypatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr("slurm.launch.check_machine", lambda cluster: None)
    monkeypatch.setattr("slurm.submission.Submission.submit", lambda self: pytest.fail("submitted"))
    with pytest.raises(SystemExit) as left:
        main(MARK, parse, [*words, "--output-dir", str(tmp_path / "run")])
    told = capsys.readouterr()
    assert left.value.code == 2 and said in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as left:
        main("utils.run.train", partial(parse_config, "dinov2/quickstart.yaml"), [])
    monkeypatch.chdir(tmp_path)
    assert left.value.code == 2
    assert "the working directory is not there any more" in capsys.readouterr().err


def test_torchrun_starts_one_run(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit):
        main(MARK, parse, ["-m", "seed=1,2", "--output-dir", str(tmp_path)])
    assert "are not for torchrun" in capsys.readouterr().err


def test_dry_run_prints_a_script_that_bash_can_read_and_writes_nothing(
    tmp_path: Path, capsys, judge: Path
) -> None:
    folder = tmp_path / "it's here" / "%j"
    words = ["-m", "seed=0,1", "--cluster", "example_a100_container", "--nodes", "2"]
    more = ["cluster.env.CACHE='$HOME/\"x\"'", "name='two seeds'", "--then", str(judge)]
    main(MARK, parse, [*words, *more, "--dry-run", "--output-dir", str(folder)])
    told = capsys.readouterr().out
    assert not folder.parent.exists()
    scripts = ["#!/bin/bash" + text for text in told.split("#!/bin/bash")[1:]]
    assert len(scripts) == 2
    for line in (
        *("--array=0-1%2", "--account=abc@a100", "--constraint=a100", "--qos=preemptible"),
        *("--exclusive", "--requeue", "--job-name=two_seeds", "--nodes=2"),
    ):
        assert f"#SBATCH {line}\n" in scripts[0]
    assert 'export CACHE="$HOME/\\"x\\""\n' in scripts[0]
    srun = next(line for line in scripts[0].splitlines() if line.startswith("srun "))
    assert "--container-image=/shared/images/pytorch.sqsh" in srun and "--cpus-per-task=8" in srun
    assert " python3 -u -m submitit.core._submit " in srun
    assert "#SBATCH --dependency=aftercorr:JOB\n" in scripts[1]
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in scripts[1] and "--nodes=1\n" in scripts[1]
    script = scripts[0].rpartition('exit "$status"')[0]
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr


def test_a_dry_run_and_a_submission_note_data_without_a_folder(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    """Once for all points, and not in the script."""
    words = ["-m", "seed=0,1", "data=folder", "--output-dir", str(tmp_path / "run")]
    note = "note: data.root is not given; without it a run stops at once\n"
    main(MARK, parse, [*words, "launcher=slurm", "--dry-run"])
    told = capsys.readouterr()
    assert told.err == note and told.out.startswith("#!/bin/bash")

    def refuse(*given, **more):
        raise UserError("no Slurm here")

    monkeypatch.setattr("slurm.launch._submission", refuse)
    monkeypatch.setattr("slurm.launch.check_machine", lambda cluster: None)
    with pytest.raises(SystemExit):
        main(MARK, parse, [*words, "launcher=slurm"])
    assert capsys.readouterr().err == f"{note}error: no Slurm here\n"


def test_the_data_of_trainings_that_a_task_is_made_of_are_noted_too(tmp_path: Path, capsys) -> None:
    def parse_two(words: list[str]) -> dict[str, Any]:
        config = plain(parse(words))
        keys = ("name", "output_dir", "device", "launcher", "cluster")
        return {**{key: config[key] for key in keys}, "runs": {"a": config, "b": config}}

    words = ["data=folder", "data.root=/nowhere", "--output-dir", str(tmp_path / "run")]
    main(MARK, parse_two, [*words, "launcher=slurm", "--dry-run"])
    told = capsys.readouterr().err
    assert told == "note: data.root: there is no /nowhere on this machine\n"


def test_a_sweep_without_a_list_says_so(started, capsys) -> None:
    main(MARK, parse, ["-m", "seed=0,1"])
    assert not capsys.readouterr().err
    main(MARK, parse, ["-m", "name='a,b'"])
    assert capsys.readouterr().err == f"note: {NO_LIST}\n" and len(started) == 2


def test_dry_run_elsewhere_tells_the_plan(tmp_path: Path, capsys) -> None:
    main(MARK, parse, ["--dry-run", "-m", "seed=0,1", "--output-dir", str(tmp_path / "run")])
    told = capsys.readouterr().out
    assert "dry run: nothing is started; launcher=here, 1 process each" in told
    assert "seed=1" in told and not (tmp_path / "run").exists()


def test_a_task_names_its_folder_absolutely() -> None:
    assert Task("f", {"output_dir": "runs/x"}).folder == Path.cwd() / "runs" / "x"
