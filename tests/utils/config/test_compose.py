"""Whatever is wrong in a config is said in one line; what is right composes and reloads."""

import errno
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from baselines.evit.network import EViT
from utils.config.build import plain, resolve
from utils.config.compose import compose_config
from utils.config.files import CONFIGS, find_file
from utils.config.flags import FLAGS, read_arguments
from utils.config.signature import keywords_of
from utils.errors import UserError


def arguments(*words: str):
    return read_arguments(list(words), "train.yaml")


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def one_line(file: object, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose_config(file, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The command line


def test_flags_and_overrides_mix_in_any_order() -> None:
    found = arguments(
        "seed=1", "--batch-size", "8", "name=x", "--no-resume", "--config-file", "a.yaml"
    )
    assert found.config_file == "a.yaml"
    assert found.overrides == [
        "recipe.batch_size_per_gpu=8",
        "training.resume=false",
        "seed=1",
        "name=x",
    ]


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        (["--nodes", "2"], "slurm"),
        (["--partition", "p"], "slurm"),
        (["--launcher", "local", "--ngpus", "2"], "local"),
        (["launcher=local", "--ngpus", "2"], "local"),
        (["--seed", "2"], None),
    ],
)
def test_cluster_flags_submit_unless_a_launcher_is_named(words: list[str], launcher: str) -> None:
    named = [w for w in arguments(*words).overrides if w.startswith("launcher=")]
    assert named == ([f"launcher={launcher}"] if launcher else [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ngpu", "2"], "unknown flag --ngpu; did you mean '--ngpus'?"),
        (["--out-dir=x"], "unknown flag --out-dir; did you mean '--output-dir'?"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--seed"], "expected one argument"),
        (["run.yaml"], "a file is given by --config-file run.yaml"),
        (["seed"], "overrides are written key=value"),
    ],
)
def test_wrong_words(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=None) as caught:
        arguments(*words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_flag_is_a_key() -> None:
    """Of a file, or a keyword of the constructor there, with one of the recipes; or of EViT."""
    configs = [
        compose_config("train.yaml", [f"recipe={recipe}", "data=folder"])
        for recipe in ("dinov2", "deit")
    ]
    for flag in FLAGS:
        group, _, name = flag.key.rpartition(".")
        found = [*keywords_of(EViT)] if group == "backbone" else []
        for config in configs:
            parent = OmegaConf.select(config, group) if group else config
            found += [] if parent is None else parent
            if parent is not None and "_target_" in parent:
                found += keywords_of(resolve(parent["_target_"]))
        assert name in found, flag.key


@pytest.mark.parametrize(
    "odd", ["my 'run', a=b: [c] {d} #e", "end\\", "two\\\\", "a\\'b", "a\\\\'b\\c"]
)
def test_text_of_flags_is_taken_as_it_is(odd: str) -> None:
    config = compose_config("train.yaml", arguments("--output-dir", odd).overrides)
    assert config.output_dir == odd


def test_a_home_folder_is_known_behind_an_equals_sign(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = arguments("--output-dir=~/r", "--weights=~/x").overrides
    assert sorted(found) == ["output_dir='/home/me/r'", "training.weights='/home/me/x'"]


def test_our_own_folder_may_have_an_apostrophe(tmp_path: Path, monkeypatch) -> None:
    ours = tmp_path / "it's"
    ours.symlink_to(CONFIGS)
    monkeypatch.setattr("utils.config.compose.CONFIGS", ours)
    assert compose_config(CONFIGS / "train.yaml").seed == 0


# Files


def test_files_are_found_by_path_and_below_configs(write, monkeypatch) -> None:
    path = write("defaults: [/train, _self_]\nseed: 7\n")
    assert compose_config(path).seed == 7
    monkeypatch.chdir(path.parent)
    assert find_file("run") == path.absolute()
    assert find_file("launcher/local") == CONFIGS / "launcher" / "local.yaml"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("trian.yaml", "there is no config file trian.yaml; did you mean 'train.yaml'?"),
        ("/nowhere/slurn.yaml", "did you mean"),
        ("", ". is a folder; give one of its files"),
        ("/", "/ is a folder; give one of its files: it has no .yaml file"),
        (str(CONFIGS / "launcher"), "is a folder; give one of its files: here.yaml, local.yaml"),
    ],
)
def test_missing_files(file: str, said: str) -> None:
    assert said in one_line(file)


def test_a_file_behind_a_closed_folder(monkeypatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)  # nothing is closed to root
    assert one_line("/closed/run.yaml") == "cannot read /closed/run.yaml: Permission denied"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults: [/train, _self_\nseed: 4\n", "run.yaml:2: bad YAML"),
        ("seed: 4\n\tx: 3\n", "run.yaml:2: bad YAML"),
        ("seed: 4\nseed: 5\n", "run.yaml:2: bad YAML: found duplicate key seed"),
        ("seed: !!python/object/apply:os.system [ls]\n", "run.yaml:1: bad YAML"),
        ("- 3\n", "a config is a mapping"),
        ("", "lacks name"),
        ("seed: 4\n", "put `defaults: [/train, _self_]` at its top"),
        ("defaults: [/trian, _self_]\n", "there is no config 'trian'; did you mean 'train'?"),
        ("defaults: /train\n", "defaults must be a list"),
        (
            "defaults: [/train, {override /launcher: slrum}, _self_]\n",
            "there is no launcher=slrum; did you mean 'slurm'?",
        ),
        (
            "defaults: [/train, {override /backbones: x}, _self_]\n",
            "no group 'backbones' to override; did you mean 'backbone'?",
        ),
        (
            "defaults: [/train, _self_]\ntraining:\n  precison: bf16\n",
            "run.yaml:3: unknown key 'training.precison'; did you mean 'training.precision'?",
        ),
        (
            "defaults: [/train, _self_]\ndata: {trian: 3}\n",
            "run.yaml:2: unknown key 'data.trian'; did you mean 'data.train'?",
        ),
        ("defaults: [/train, _self_]\nname: ${nme}\n", "name: Interpolation key 'nme' not found"),
        ("defaults: [/train, _self_]\nname: ${oc.env:NO_SUCH}\n", "'NO_SUCH' not found"),
        ("defaults: [/train, _self_]\nname: ${eval:1+1}\n", "Unsupported interpolation type eval"),
        ("defaults: [/train, _self_]\nseed: x\n", "seed must be a whole number, got 'x'"),
        ("defaults: [/train, _self_]\ntraining: 3\n", "training must be a mapping"),
        ("defaults: [/train, _self_]\nprobe_every: true\n", "probe_every must be a whole number"),
    ],
)
def test_wrong_files(write, text: str, said: str) -> None:
    assert said in one_line(write(text))


def test_another_ending_is_refused(write) -> None:
    assert "must end in .yaml" in one_line(write("defaults: [/train, _self_]\n", "run.yml"))


# Overrides


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("trainig.precision=bf16", "did you mean 'training.precision'?"),
        ("precision=bf16", "did you mean"),
        ("recipe.crop.local_crops_number=2", "did you mean 'recipe.crops.local_crops_number'?"),
        ("launcher=slrum", "there is no launcher=slrum; did you mean 'slurm'? (options: here"),
        ("launchr=slurm", "unknown key 'launchr'; did you mean 'launcher'?"),
        ("seed=[1", "cannot read 'seed=[1'"),
        ("seed=1,2", "gives several values"),
        ("seed=x", "seed must be a whole number"),
        ("+foo=3", "unknown key 'foo'"),
        ("~seed", "lacks seed"),
        ("data=null", "the group data needs one of its options"),
        ("hydra.verbose=true", "Hydra's own settings"),
        ("launcher.nodes=2.5", "launcher.nodes must be a whole number"),
    ],
)
def test_wrong_overrides(override: str, said: str) -> None:
    assert said in one_line("train.yaml", override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name=seed=0,lr=1e-3", """: "name='seed=0,lr=1e-3'\""""),
        ("name=my photos, 2024", """: "name='my photos, 2024'\""""),
        ("name=$1,=", """: 'name='"'"'$1,='"'"''"""),
        ("seed=[1", """: "key='value'\""""),
    ],
)
def test_text_that_needs_quotes_is_told_as_the_shell_takes_it(override: str, said: str) -> None:
    assert one_line("train.yaml", override).endswith(said)


def test_the_corrected_word_is_taken() -> None:
    for text in ("seed=0,lr=1e-3", "it's, $5"):
        (word,) = shlex.split(one_line("train.yaml", f"name={text}").rpartition("own: ")[2])
        assert compose_config("train.yaml", [word]).name == text


def test_a_mapping_of_the_users_own_keys_may_be_given_whole() -> None:
    words = ["cluster.sbatch_options={reservation: spring, exclusive: true}", "cluster.env={A: b}"]
    cluster = compose_config("train.yaml", ["launcher=slurm", *words]).cluster
    assert cluster.sbatch_options == {"reservation": "spring", "exclusive": True}
    assert cluster.env["A"] == "b"


def test_a_keyword_that_the_file_leaves_out_can_be_set() -> None:
    assert compose_config("train.yaml", ["backbone.depth=3"]).backbone.depth == 3


def test_group_of_the_users_own_folder(tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "mine.yaml").write_text(
        "kind: local\nnodes: 1\ngpus_per_node: 3\ntimeout_min: 5\n"
    )
    run = tmp_path / "run.yaml"
    run.write_text("defaults: [/train, {override /launcher: mine}, _self_]\n")
    assert compose_config(run).launcher.gpus_per_node == 3


# A saved run


def test_a_run_file_takes_the_net_below_it_away_with_its_keys(tmp_path: Path) -> None:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/mine.yaml").write_text("{_target_: vit.models.mine, depth: 3}")
    run = tmp_path / "run.yaml"
    run.write_text(
        "defaults: [/deit/quickstart, /parts/no_backbone, /backbone/mine, _self_]\n"
        "backbone: {num_classes: 10}"
    )
    expected = {"_target_": "vit.models.mine", "depth": 3, "num_classes": 10}
    assert plain(compose_config(run))["backbone"] == expected


def test_saved_config_reloads_and_its_groups_can_be_swapped(tmp_path: Path, monkeypatch) -> None:
    config = compose_config("train.yaml", ["seed=5", "name=abc", "recipe.epochs=3"])
    OmegaConf.save(config, tmp_path / "config.yaml")
    again = compose_config(tmp_path / "config.yaml")
    assert OmegaConf.to_container(again) == OmegaConf.to_container(config)
    changed = compose_config(
        tmp_path / "config.yaml", ["launcher=slurm", "launcher.nodes=3", "recipe.epochs=4"]
    )
    assert (changed.launcher.kind, changed.launcher.nodes) == ("slurm", 3)
    assert (changed.recipe.epochs, changed.seed, changed.output_dir) == (4, 5, "runs/abc")


def test_environment_is_read_at_composition(write, monkeypatch) -> None:
    monkeypatch.setenv("OCTIC_TEST_NAME", "from_env")
    path = write("defaults: [/train, _self_]\nname: ${oc.env:OCTIC_TEST_NAME}\n")
    assert compose_config(path).output_dir == "runs/from_env"
