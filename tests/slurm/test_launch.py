"""The same function runs here, in several processes, under torchrun and through submitit."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import parameters
from slurm.job import Job
from slurm.launch import launch, launch_all, submit
from slurm.task import Task
from utils.config.build import plain
from utils.config.compose import compose_config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORK = "tests.slurm.work"
# The quickstart's run, smaller still.
TINY = [
    *("backbone.depth=2", "backbone.embed_dim=64", "recipe.batch_size_per_gpu=4"),
    *("recipe.crops.local_crops_number=1", "recipe.dino_head.num_prototypes=16"),
    *(
        "recipe.dino_head.hidden_dim=16",
        "training.max_steps=2",
        "training.log_every=1",
        "~probes.knn",
    ),
]


@pytest.fixture(autouse=True)
def workers_find_us(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def config_for(folder: Path, *overrides: str) -> dict[str, Any]:
    return plain(compose_config("train.yaml", [f"output_dir='{folder}'", *overrides]))


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("note*.json"))]


# Here


def test_here_runs_in_process_and_returns(tmp_path: Path) -> None:
    assert launch(f"{WORK}.report", config_for(tmp_path, "seed=3")) == 0
    assert notes(tmp_path) == [{"world_size": 1, "total": 1.0, "seed": 3}]


@pytest.mark.parametrize(
    ("function", "code", "said"),
    [
        ("refuse", 2, "error: the moon is in the wrong phase\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_mistakes_and_interrupts_are_one_line(
    tmp_path: Path, capsys, function: str, code: int, said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        launch(f"{WORK}.{function}", config_for(tmp_path))
    assert left.value.code == code and capsys.readouterr().err == said


def test_other_errors_are_raised_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="had enough"):
        launch(f"{WORK}.fail_on_second", config_for(tmp_path))


def test_two_runs_in_one_folder_are_refused_before_either_starts(tmp_path: Path, capsys) -> None:
    """What would come of the second hangs on the first, and neither would be found again."""
    task = Task(f"{WORK}.report", config_for(tmp_path / "same"))
    follower = Task(f"{WORK}.report", task.config)
    for tasks in ([task, follower], [Task(task.function, task.config, then=[follower])]):
        with pytest.raises(SystemExit):
            launch_all(tasks)
        assert f"error: two runs would write to {task.folder}" in capsys.readouterr().err
    assert not task.folder.exists()


@pytest.mark.parametrize(
    ("ending", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["INT", "TERM"]
)
def test_an_interrupted_sweep_tells_of_every_point(
    tmp_path: Path, capsys, monkeypatch, ending: BaseException, code: int
) -> None:
    def run_apart(function: Any, task: Task) -> int:
        if task.values["seed"] == "2":
            raise ending
        return 0

    monkeypatch.setattr("slurm.launch.run_apart", run_apart)

    def point(name: str, seed: str) -> Task:
        config = config_for(tmp_path / name)
        del config["recipe"], config["backbone"]  # nothing to build
        return Task(f"{WORK}.report", config, {"seed": seed})

    points = [point(seed, seed) for seed in "123"]
    points[1].then = [point("then", "2")]
    with pytest.raises(SystemExit) as left:
        launch_all(points, folder=tmp_path)
    rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    told = [tuple(word.strip() for word in row) for row in rows]
    assert left.value.code == code
    assert told == [
        ("1", "succeeded"),
        ("2", f"interrupted, code {code}"),
        *[("2", "not started"), ("3", "not started")],
    ]


# Several processes on this machine


def test_local_processes_meet(tmp_path: Path) -> None:
    launch(f"{WORK}.report", config_for(tmp_path, "launcher=local", "launcher.gpus_per_node=2"))
    assert notes(tmp_path) == [{"world_size": 2, "total": 3.0, "seed": 0}] * 2
    assert "rank 1 of 2 was here" in (tmp_path / "logs" / "rank1.log").read_text()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fail_on_second", "RuntimeError: the second rank has had enough; its output: "),
        ("die_on_second", "process 1 terminated with signal SIGKILL"),
    ],
)
def test_one_failure_stops_all(tmp_path: Path, capsys, function: str, said: str) -> None:
    with pytest.raises(SystemExit) as left:
        launch(f"{WORK}.{function}", config_for(tmp_path, "launcher=local"))
    assert left.value.code not in (0, None)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: rank 1 failed: ") and said in last


def test_a_mistake_found_by_the_processes_is_one_line(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        launch(f"{WORK}.refuse", config_for(tmp_path, "launcher=local"))
    assert left.value.code == 2
    assert "error: the moon is in the wrong phase\n" in capsys.readouterr().err


# Torchrun


def torchrun(folder: Path, function: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes that start a function of `work` as an experiment does."""
    program = folder / "program.py"
    program.write_text(
        "from slurm.launch import launch\n"
        "from utils.config.compose import parse_config\n"
        f"launch('{WORK}.{function}', parse_config('train.yaml'))\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *command, str(program), *words, "--output-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_torchrun_joins_whatever_the_launcher_says(tmp_path: Path) -> None:
    assert torchrun(tmp_path, "report", "--ngpus", "8").returncode == 0
    assert notes(tmp_path) == [{"world_size": 2, "total": 3.0, "seed": 0}] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("refuse", "the moon is in the wrong phase\n"),
        ("fail_on_second", "RuntimeError: the second rank has had enough\n"),
    ],
)
def test_torchruns_report_says_what_went_wrong(tmp_path: Path, function: str, said: str) -> None:
    ended = torchrun(tmp_path, function)
    report = ended.stderr[ended.stderr.rindex("Root Cause") :]
    assert ended.returncode == 1 and said in report
    assert ended.stderr.count(f"error: {said}") <= 1  # by the first process, if it comes to that


# Submitit


def test_two_tasks_through_submitits_local_executor(tmp_path: Path) -> None:
    folder = tmp_path / "%j"
    overrides = ("launcher=slurm", "launcher.gpus_per_node=2", "cluster.executor=local")
    job = submit(f"{WORK}.report", config_for(folder, *overrides))
    assert job.results() == [0, 1]
    assert notes(tmp_path / job.job_id) == [{"world_size": 2, "total": 3.0, "seed": 0}] * 2


def fake_slurm(folder: Path, answer: str, code: int = 0) -> None:
    folder.mkdir()
    for name in ("sbatch", "srun"):
        path = folder / name
        path.write_text(f"#!/bin/sh\ncp $1 {folder}/submitted.sh\necho '{answer}'\nexit {code}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_job_asks_for_what_the_config_says(tmp_path: Path, monkeypatch, capsys) -> None:
    fake_slurm(tmp_path / "bin", "Submitted batch job 77")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    config = config_for(
        tmp_path / "runs" / "%j",
        *("launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4"),
        *("cluster=example_a100", "cluster.mail=me@example.org", "cluster.comment='a b'"),
        *("launcher.timeout_min=30", "name='a run'", "backbone.depth=2"),
    )
    assert launch("utils.run.train", config) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Submitted job_id: 77"
    assert said[1] == f"Logs and checkpoints will be saved at: {tmp_path}/runs/77"
    assert said[2] == f"Follow rank 0: tail -F {tmp_path}/runs/77/slurm/77_0_log.out"
    assert said[3:] == ["State: squeue -j 77; after its end: sacct -j 77", "Cancel: scancel 77"]
    asked = (tmp_path / "bin" / "submitted.sh").read_text()
    for line in (
        *("--nodes=2", "--ntasks-per-node=4", "--gres=gpu:a100:4", "--time=30"),
        *("--partition=gpu", "--account=project-2026-1", "--cpus-per-task=16", "--mem=240GB"),
        *("--mail-user=me@example.org", "--mail-type=ALL", "--comment='a b'", "--job-name=a_run"),
        "--signal=USR2@120",
    ):
        assert f"#SBATCH {line}\n" in asked
    assert "module load CUDA/12.8\n" in asked and "gpus-per-node" not in asked


def test_unset_facts_are_the_clusters_own(tmp_path: Path) -> None:
    asked = parameters(config_for(tmp_path, "launcher=slurm"))
    assert not {"slurm_partition", "slurm_account", "mem_gb", "cpus_per_task"} & set(asked)
    assert asked["slurm_gpus_per_node"] == 1
    asked = parameters(config_for(tmp_path, "cluster.gpu_type=A40"))
    assert asked["slurm_gpus_per_node"] == "A40:1"
    asked = parameters(config_for(tmp_path, "cluster.gpu_request=none"))
    assert not {"slurm_gpus_per_node", "slurm_gres"} & set(asked)


def test_what_slurm_refuses_is_one_line(tmp_path: Path, monkeypatch) -> None:
    fake_slurm(tmp_path / "bin", "sbatch: error: invalid partition specified: nope", code=1)
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2\nexit 1\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match="Slurm refused the job: .*invalid partition") as caught:
        submit(f"{WORK}.report", config_for(tmp_path, "launcher=slurm"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.executor=pbs", "cluster.executor is slurm or local, not 'pbs'"),
        ("cluster.gpu_request=all", "cluster.gpu_request is gpus_per_node, gres, none, not 'all'"),
    ],
)
def test_wrong_facts(tmp_path: Path, override: str, said: str) -> None:
    config = config_for(tmp_path, "launcher=slurm", "cluster.executor=local", override)
    with pytest.raises(UserError, match=said):
        submit(f"{WORK}.report", config)


def test_a_job_is_queued_again_as_it_was(tmp_path: Path) -> None:
    job = Job(f"{WORK}.report", config_for(tmp_path))
    again = job.checkpoint()
    assert again.function is job and not again.args and not again.kwargs


# The main job


@pytest.mark.slow
def test_training_is_the_same_however_it_is_launched(tmp_path: Path) -> None:
    """Two processes under torchrun, by launcher=local and as submitit's tasks: the same losses."""
    script = "experiments/train_dinov2.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {
        "torchrun": [*torchrun, script],
        "local": [script, "--launcher", "local", "--ngpus", "2"],
    }
    for name, words in ways.items():
        subprocess.run(
            [sys.executable, *words, "--output-dir", str(tmp_path / name), *TINY],
            cwd=ROOT,
            check=True,
            timeout=600,
        )
    overrides = ["launcher=slurm", "launcher.gpus_per_node=2", "cluster.executor=local", *TINY]
    folder = tmp_path / "submitit"
    config = compose_config("dinov2/quickstart.yaml", [f"output_dir='{folder}'", *overrides])
    results = submit("utils.run.train", config).results()
    assert [result["step"] for result in results] == [2, 2]

    losses = {
        path.parent.name: [json.loads(line).get("loss") for line in path.read_text().splitlines()]
        for path in tmp_path.glob("*/metrics.jsonl")
    }
    assert len(losses) == 3 and losses["torchrun"][0] is not None
    assert losses["torchrun"] == losses["local"] == losses["submitit"]
