"""Overrides where a run file, or a saved run, says null or has no groups to choose from."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.config.compose import compose_config
from utils.config.overrides import parse_words
from utils.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe.mixing.mode=elem"], "'recipe.mixing.mode' has no place: recipe.mixing is null"),
        (["probes.accuracy=null", "probes.accuracy.batch_size=7"], "probes.accuracy is null here"),
        (["probe@probes.knn=knn"], "no effect: the run sets probes.knn to null; another name will"),
    ],
)
def test_what_a_null_swallows_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_config("deit/quickstart_mirror.yaml", overrides)
    assert said in str(caught.value)


def test_a_null_may_be_filled_before_its_keys_are_set() -> None:
    whole = "recipe.mixing={_target_:deit.mixing.Mixing}"
    words = ["recipe.mixing=null", whole, "recipe.mixing.mode=elem", "+probe@probes.knn_2=knn"]
    config = compose_config("deit/quickstart_mirror.yaml", words)
    assert config.recipe.mixing.mode == "elem" and config.probes.knn_2


def test_an_empty_mapping_leaves_nothing_out_and_says_so() -> None:
    """A reader takes `probes={}` for no probes; merged into those that are there, it is nothing."""
    with pytest.raises(UserError, match="'probes={}' changes nothing.*; probes=null leaves out"):
        compose_config("deit/quickstart.yaml", ["probes={}"])
    with pytest.raises(UserError, match="'~probes': every run has the key.*; probes=null leaves o"):
        compose_config("deit/quickstart.yaml", ["~probes"])
    assert compose_config("deit/quickstart.yaml", ["probes=null"]).probes is None
    assert compose_config("deit/quickstart.yaml", ["cluster.env={}"]).cluster.env == {}


def test_a_mapping_brings_what_its_constructor_takes() -> None:
    words = ["backbone={_target_:octic.models.hybrid_deit_small_patch16,group:C4}"]
    words += [
        "probes={mine:{_target_:evaluation.probes.knn.KnnProbe}}",
        "recipe.mixing={mixup:0.5}",
    ]
    config = compose_config("deit/quickstart.yaml", words)
    assert config.backbone.group == "C4" and config.backbone.patch_size == 8
    assert config.probes.mine and config.probes.accuracy and config.recipe.mixing.mixup == 0.5
    with pytest.raises(UserError, match=r"unknown key 'training\.foo'"):
        compose_config("deit/quickstart.yaml", ["training={foo:1}"])


def test_groups_of_the_users_lie_beside_a_run_file(tmp_path: Path) -> None:
    for group, target in (("data", "train: {_target_: a.B}\nval: null\n"), ("backbone", "x: 1\n")):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(target)
    run = tmp_path / "run.yaml"
    run.write_text("defaults: [/eval/deit, {override /backbone: mine}, _self_]\n")
    config = compose_config(run, ["data=mine"], base="evaluate")
    assert config.data.train._target_ == "a.B" and config.backbone == {"x": 1}


def test_a_saved_run_takes_another_probe(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    OmegaConf.save(compose_config("deit/quickstart.yaml"), saved)
    words = ["+probe@probes.near=knn", "probes.near.ks=[5]", "probe@probes.knn=knn"]
    probes = compose_config(saved, words).probes
    assert probes.near.ks == [5] and probes.knn.ks == [10, 20, 100, 200]
    assert probes.accuracy == compose_config(saved).probes.accuracy


def test_of_a_keyword_given_twice_the_last_word_counts() -> None:
    words = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps"]
    words += ["optimizer.momentum=0.9", "optimizer.momentum=0.95", "cluster.env.A=1"]
    config = compose_config("train.yaml", [*words, "cluster.env.A=2"])
    assert config.optimizer.momentum == 0.95 and config.cluster.env.A == 2


def test_a_saved_run_keeps_its_launchers_keys(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    words = ["launcher=slurm", "launcher.gpus_per_node=4", "launcher.timeout_min=60"]
    OmegaConf.save(compose_config("train.yaml", words), saved)
    launcher = compose_config(saved, ["launcher=slurm", "launcher.nodes=8"]).launcher
    assert launcher == {"kind": "slurm", "nodes": 8, "gpus_per_node": 4, "timeout_min": 60}
    assert compose_config(saved, ["launcher=local"]).launcher.timeout_min == 2800


def test_what_is_put_into_a_saved_run_takes_the_runs_own_keys(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    OmegaConf.save(compose_config("train.yaml", ["seed=5"]), saved)
    config = compose_config(saved, ["recipe=deit", "data=folder", "data.root=/x"])
    assert config.recipe.seed == config.seed == 5 and config.data.train.root == "/x"


def test_a_run_of_before_a_key_was_offered_goes_on_with_its_default(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    whole = compose_config("train.yaml", ["training.log_every=3"])
    older = OmegaConf.to_container(whole)
    del older["training"]["hang_timeout_s"], older["launcher"]["timeout_min"]
    OmegaConf.save(OmegaConf.create(older), saved)
    assert compose_config(saved) == whole


def test_a_file_that_builds_on_a_training_is_no_evaluation(tmp_path: Path) -> None:
    """Also where its own keys do not tell, and before a key is called unknown."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [/deit/quickstart, _self_]\n")
    with pytest.raises(UserError, match=r"describes a training; .* `defaults: \[/evaluate, _self_"):
        compose_config(mine, ["weights=run"], base="evaluate")
    with pytest.raises(UserError, match=r"`defaults: \[/eval/deit, _self_\]`$"):
        compose_config(mine, base="evaluate", default="eval/deit.yaml")


def test_an_unknown_option_says_where_a_file_of_ones_own_stands() -> None:
    with pytest.raises(UserError, match=r"no data=my_table \(.*\); one of yours is data/my_table"):
        compose_config("evaluate.yaml", ["data=my_table"], base="evaluate")
    with pytest.raises(UserError, match="no data=digit; did you mean 'digits'[^;]*$"):
        compose_config("evaluate.yaml", ["data=digit"], base="evaluate")


def test_a_training_is_no_evaluation_to_compose(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    OmegaConf.save(compose_config("train.yaml"), saved)
    for file in (saved, "deit/quickstart.yaml"):
        with pytest.raises(UserError, match="describes a training; without --config-file, the fol"):
            compose_config(file, base="evaluate")


def test_values_of_a_list_need_quotes_each() -> None:
    """Paths with = in them: in one pair of quotes they would be one path."""
    with pytest.raises(UserError, match=r"""for -m: "weights='a=1/x','a=2/x'"$"""):
        parse_words(["weights=a=1/x,a=2/x"])
    with pytest.raises(UserError, match=r"""of its own: "weights='a,b'"$"""):
        parse_words(["weights=a,b"])
