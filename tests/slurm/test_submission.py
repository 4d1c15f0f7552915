"""Answers of sbatch that are not the usual one, and which Python a job starts."""

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import python_command
from slurm.submission import Submission
from utils.config.build import plain
from utils.config.compose import compose_config
from utils.errors import UserError


@pytest.fixture
def submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A submission to an sbatch that does what a line of shell says."""

    def make(line: str, *words: str) -> Submission:
        place = tmp_path / "bin"
        place.mkdir()
        for name in ("sbatch", "srun", "squeue"):
            (place / name).write_text(f"#!/bin/sh\n{line}\n")
            (place / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
        folder = f"output_dir='{tmp_path / 'runs' / '%j'}'"
        config = plain(compose_config("train.yaml", [folder, "launcher=slurm", *words]))
        return Submission("tests.slurm.work.report", [config])

    return make


def left_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir())


def test_the_short_answer_of_a_site_with_several_clusters(tmp_path: Path, submission) -> None:
    (job,) = submission("echo '77;mycluster'").submit()
    assert job.job_id == "77"
    assert (tmp_path / "runs" / "77" / "launches.jsonl").is_file()


def test_an_answer_without_an_id(tmp_path: Path, submission) -> None:
    with pytest.raises(UserError) as caught:
        submission("echo welcome; echo to the cluster").submit()
    said = str(caught.value)
    assert said.startswith("sbatch answered 'welcome to the cluster', which names no job: ")
    assert "if squeue --me lists 'octic', cancel it" in said
    assert "\n" not in said and not left_of(tmp_path / "runs")


@pytest.mark.parametrize(
    ("line", "said"),
    [("exit 3", "it gave no reason"), ("echo 'no budget'; exit 3", "no budget")],
)
def test_a_refusal_without_a_reason(tmp_path: Path, submission, line: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"Slurm refused the job: {said} \(asked for nodes=1"):
        submission(line).submit()
    assert not left_of(tmp_path / "runs")


def test_the_folder_of_a_job_that_has_not_ended_is_refused(tmp_path: Path, submission) -> None:
    """Its job would find the folder in use, or go on with a run that it was not meant for."""
    state, place = tmp_path / "state", f"output_dir='{tmp_path / 'run'}'"
    asked = submission(f"case $0 in *squeue) cat {state};; *) echo 77;; esac", place)
    asked.submit()
    again = Submission("tests.slurm.work.report", asked.configs)
    state.write_text("PENDING\n")
    with pytest.raises(UserError, match="run is the run folder of job 77, PENDING: .*scancel 77"):
        again.submit()
    state.write_text("")
    assert again.submit()[0].job_id == "77"


def test_a_python_whose_path_has_a_space_is_one_word(tmp_path: Path, submission) -> None:
    python = tmp_path / "my env" / "python"
    python.parent.mkdir()
    python.touch()
    script = submission("", f"cluster.python='{python}'").script()
    assert f" '{python}' -u -m submitit.core._submit " in script
    command = "apptainer exec --nv image.sif python"
    assert python_command({"python": command}) == command


def test_a_refused_array_leaves_no_file(tmp_path: Path, submission) -> None:
    asked = submission("echo 'not today' >&2; exit 1")
    with pytest.raises(UserError, match="Slurm refused the job: not today"):
        Submission("tests.slurm.work.report", [*asked.configs, *asked.configs]).submit()
    assert left_of(tmp_path / "runs") == []


def test_without_the_copy_of_the_code_nothing_else_runs(tmp_path: Path, submission) -> None:
    """An installed checkout would run in its place, which is another code by then."""
    asked = submission('case $0 in *srun) echo "$PYTHONPATH" >> "$RAN";; esac')
    (tmp_path / "bin" / "sleep").write_text("#!/bin/sh\n")  # a minute
    (tmp_path / "bin" / "sleep").chmod(stat.S_IRWXU)
    ran, code = tmp_path / "ran", tmp_path / "runs" / "77" / "code" / asked.snapshot.name
    env = {**os.environ, "RAN": str(ran), "SLURM_JOB_ID": "77", "PYTHONPATH": ""}
    command = ["bash", "-c", asked.script()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and not ran.exists()
    assert done.stdout.splitlines()[-1] == f"error: the copy of the code is gone: {code}"
    code.mkdir(parents=True)
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert ran.read_text() == f"{code}\n"


@pytest.mark.parametrize("env", ["null", "{A: null}"])
def test_null_leaves_a_matter_to_the_cluster(submission, env: str) -> None:
    lists = ("modules", "setup", "srun_args", "sbatch_options", "container_mounts")
    nulls = [f"cluster.{key}=null" for key in lists]
    script = submission("", f"cluster.env={env}", *nulls).script()
    assert script.startswith("#!/bin/bash") and "None" not in script and "export A=" not in script
