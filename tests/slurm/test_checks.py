"""What the launcher refuses: by --check, by --dry-run and when it is to start."""

from functools import partial
from pathlib import Path

import pytest

from slurm.command import main
from utils.config.compose import parse_config

parse = partial(parse_config, "dinov2/quickstart.yaml")
SLURM = "launcher=slurm"
NUMBERS = [
    ("mem_gb=-5", "must be finite and at least 0, not -5"),
    ("cpus_per_task=0", "must be a whole number from 1, not 0"),
    ("signal_delay_s=-1", "must be a whole number from 0, not -1"),
    ("signal_delay_s=70000", "must lie in [0, 65535], not 70000"),
    ("max_requeues=-1", "must be a whole number from 0, not -1"),
    ("max_restarts=-1", "must be a whole number from 0, not -1"),
    ("array_parallelism=0", "must be a whole number from 1, not 0"),
]
REFUSED = [
    (
        ["launcher.nodes=2"],
        "launcher=here runs one process: launcher.nodes=2 is for launcher=local",
    ),
    (["launcher.gpus_per_node=4"], "launcher.gpus_per_node=4 is for launcher=local, launcher="),
    (
        ["launcher=local", "--nodes", "2"],
        "launcher=local runs on this machine: launcher.nodes must",
    ),
    (
        [SLURM, "--timeout", "1"],
        "launcher.timeout_min=1 is not longer than cluster.signal_delay_s=",
    ),
    ([SLURM, "cluster.container_image=x.sqsh"], "such as cluster.python=python3"),
    ([SLURM, "cluster.executor=local", "--nodes", "2"], "cluster.executor=local runs on this mach"),
    ([SLURM, "cluster.executor=local", "cluster.python=/no/python"], "no program '/no/python'"),
    ([SLURM, "cluster.env={a-b: 1}"], "cluster.env: 'a-b' is no name of an environment variable"),
    *(
        ([SLURM, f"cluster.{word}"], f"cluster.{word.split('=')[0]} {said}")
        for word, said in NUMBERS
    ),
    (["launcher.timeout_min=48:00:00"], "launcher.timeout_min is in minutes: 2880 for 48:00:00"),
    ([SLURM, "--timeout", "1-12:30"], "--timeout is in minutes: 2190 for 1-12:30"),
    (["--timeout=45:30"], "--timeout is in minutes: 46 for 45:30"),
]
FOLDERS = [
    (SLURM, "%x-%j", "of Slurm's patterns only %j, the job's id, can be used here, not %x"),
    (SLURM, "100%", "can be used here, not %"),
    (SLURM, "t10:00", "no copy of the code below a folder with a colon in its name"),
    ("launcher=here", "%j", "%j is the id of a Slurm job, and this run has none"),
    ("launcher=local", "a/%j", "%j is the id of a Slurm job, and this run has none"),
]


def refused(capsys, words: list[str], folder: Path) -> str:
    with pytest.raises(SystemExit) as left:
        main("tests.slurm.work.mark", parse, [*words, "--output-dir", str(folder)])
    told = capsys.readouterr()
    assert left.value.code == 2 and told.out == ""
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
    assert not folder.exists()
    return told.err


@pytest.mark.parametrize("how", ["--check", "--dry-run"])
@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_launch_that_cannot_be_meant(tmp_path: Path, capsys, how, words, said) -> None:
    assert said in refused(capsys, [*words, how], tmp_path / "run")


def test_it_is_refused_when_it_is_to_start_too(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("slurm.launch.check_machine", lambda cluster: None)
    for words, said in (REFUSED[0], REFUSED[2], REFUSED[3], REFUSED[-3]):
        assert said in refused(capsys, words, tmp_path / "run")


@pytest.mark.parametrize("how", ["--check", "--dry-run"])
@pytest.mark.parametrize(("launcher", "name", "said"), FOLDERS)
def test_patterns_in_the_run_folder(tmp_path: Path, capsys, how, launcher, name, said) -> None:
    assert said in refused(capsys, [launcher, how], tmp_path / name)


def test_a_sweep_is_checked_too(tmp_path: Path, capsys) -> None:
    words = ["-m", "seed=1,2", "--check", SLURM, "cluster.mem_gb=-1"]
    assert "cluster.mem_gb must be" in refused(capsys, words, tmp_path / "run")


def test_torchrun_takes_the_place_of_the_launcher(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    small = ["backbone.depth=2", "backbone.embed_dim=64", "launcher.gpus_per_node=4", "--check"]
    with pytest.raises(SystemExit) as left:
        main("tests.slurm.work.mark", parse, [*small, "--output-dir", str(tmp_path / "run")])
    assert left.value.code == 0
    assert "the config is valid" in capsys.readouterr().out
