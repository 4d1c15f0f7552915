"""The command line as a person meets it: help at once, one line for a mistake, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "experiments/train_dinov2.py"
# What reads no config of its own: a page made of a folder, arithmetic about probes and scaling,
# measurements.
WITHOUT_CONFIG = (
    "report.py",
    "plan_probes.py",
    "scaling.py",
    "anatomy.py",
    "speed.py",
    "make_lmdb.py",
    "make_shards.py",
)
EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("*.py"))


def run(*words: str, script: str = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, script, *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("script", [name for name in EXPERIMENTS if name != "quickstart.py"])
def test_help_answers_at_once_without_torch(script: str) -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['{script}', '--help']\n"
        "try: runpy.run_path(f'experiments/{sys.argv[0]}', run_name='__main__')\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "heavy = {'torch', 'timm', 'hydra', 'omegaconf', 'submitit', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    assert used < 1, "the processor's time, as other tests may keep the machine busy"
    if script not in WITHOUT_CONFIG:
        assert "--ngpus" in done.stdout and "hybrid_vitl16" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ngpu", "2"], "error: unknown flag --ngpu; did you mean '--ngpus'?"),
        (["trainig.compile=true"], "error: unknown key 'trainig.compile'; did you mean"),
        (["--model", "dinov2_vit_smal_patch16"], "did you mean 'dinov2_vit_small_patch16'?"),
        (["--config-file", "dinov2/quikstart.yaml"], "did you mean 'dinov2/quickstart.yaml'?"),
        (["recipe.epohs=3"], "error: recipe: DINOv2 takes no 'epohs'; did you mean 'epochs'?"),
        (["launcher.kind=cloud"], "error: launcher.kind is here, local, slurm, not 'cloud'"),
        (["--ngpus", "0"], "error: launcher.gpus_per_node must be at least 1"),
        (["backbone._target_=os.system"], "error: backbone: 'os.system' cannot be built"),
    ],
)
def test_a_typo_is_one_line_and_code_2(words: list[str], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_without_slurm_one_line_says_so(tmp_path: Path) -> None:
    done = run("--nodes", "2", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no sbatch on this machine")
    assert done.stderr.count("\n") == 1


def test_check_prints_config_and_cost_and_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run("--check", "--output-dir", str(folder), "backbone.depth=2")
    assert done.returncode == 0, done.stderr
    assert f"output_dir: {folder}" in done.stdout
    assert "M parameters" in done.stdout and "G multiply-adds at 32 x 32" in done.stdout
    assert done.stdout.endswith("the config is valid\n") and not folder.exists()


def test_check_names_a_keyword_that_no_constructor_takes() -> None:
    done = run("--check", "backbone.dept=2")
    assert done.returncode == 2 and done.stdout == ""
    assert "takes no 'dept'; did you mean 'depth'?" in done.stderr


def test_a_model_takes_its_run_file_and_flags_of_the_original_are_keys() -> None:
    """`train_deit.py --model X` is configs/deit/X.yaml, whose batch of 2048 no flag changes."""
    words = [
        "--model",
        "hybrid_deit_large_patch16",
        "--check",
        "--drop-path",
        "0.3",
        "--lr",
        "0.002",
    ]
    words += ["--input-size", "192", "--data-path", "data", "--nodes", "4", "--ngpus", "4"]
    done = run(*words, script="experiments/train_deit.py")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    recipe, schedules = config["recipe"], config["recipe"]["schedules"]
    assert config["name"] == "hybrid_deit_large_patch16" and config["data"]["root"] == "data"
    assert (recipe["drop_path_rate"], schedules["lr"], recipe["batch_size_per_gpu"]) == (
        0.3,
        2e-3,
        128,
    )
    assert schedules["update"] == "one_epoch_late" and config["backbone"]["img_size"] == 192
    assert "batch 2048 = 128 images x 1 micro-batches x 16 processes" in done.stdout


def test_a_batch_that_cannot_be_kept_is_refused_with_numbers_that_would() -> None:
    words = ["--model", "hybrid_deit_huge_patch14", "--check", "--batch", "48", "launcher=local"]
    done = run(*words, "--ngpus", "8", script="experiments/train_deit.py")
    assert done.returncode == 2 and done.stdout == ""
    assert "batch_size_per_gpu=32 accumulation=8 would keep it" in done.stderr


@pytest.mark.slow
def test_a_model_without_a_run_file_trains_with_the_recipe() -> None:
    words = ["--model", "d8_inv_early_deit_small_patch16", "--check", "--data-path", "data"]
    done = run(*words, script="experiments/train_deit.py")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["name"] == "d8_inv_early_deit_small_patch16"  # and so is its folder
    assert config["recipe"]["_target_"] == "deit.recipe.DeiT"
    assert config["backbone"]["_target_"].endswith("d8_inv_early_deit_small_patch16")
