"""Comma lists are points, as Hydra's basic sweeper counts them."""

from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from evaluation.commands.eval_swag import LISTS
from slurm.sweep import points
from utils.errors import UserError


@pytest.mark.parametrize(
    "words",
    [
        ["a.lr=1e-3,2e-3", "seed=range(0,3)", "name=x"],
        ["seed=choice(1,2)", "betas=[0.9,0.95],[0.9,0.99]", "+x.y=null,true"],
        ["text='a,b','c d'", "seed=5"],
        ["seed=1,2", "seed=3", "lr=1,2"],
        ["a={b:1},{b:2}", "data.root=/x/a.tar,/x/b.tar"],
    ],
)
def test_the_points_are_those_of_hydras_basic_sweeper(words: list[str]) -> None:
    parsed = OverridesParser.create().parse_overrides(words)
    (expected,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert sorted(map(sorted, expected)) == sorted(sorted(point.words) for point in points(words))


def test_flags_with_numbers_and_groups_list_too_and_others_keep_their_commas() -> None:
    words = ["OUTPUT", "--lr", "1e-3,2e-3", "--exclude", "node1,node2", "--model=a,b", "--resume"]
    found = points(words)
    assert [point.label for point in found] == [
        *("lr=1e-3,backbone=a", "lr=1e-3,backbone=b"),
        *("lr=2e-3,backbone=a", "lr=2e-3,backbone=b"),
    ]
    rest = ["--exclude", "node1,node2", "--model=a", "--resume"]
    assert found[0].words == ["OUTPUT", "--lr=1e-3", *rest]


def test_own_flags_of_a_script_list_points_where_it_says_so() -> None:
    words = ["-m", "tome_vit_b16_in1k", "--tome_r", "10,20", "--ats_blocks_indexes", "3,6"]
    found = points(words, LISTS)
    assert [point.label for point in found] == ["tome_r=10", "tome_r=20"]
    assert found[0].words == ["-m", "tome_vit_b16_in1k", "--tome_r=10", *words[4:]]
    assert [point.label for point in points(["--tome_r", "10,20"])] == [""]


def test_commas_in_brackets_and_in_the_name_of_a_file_list_no_points(tmp_path: Path) -> None:
    """The runs of a sweep lie in folders named by it, and some settings are lists themselves."""
    run = tmp_path / "lr=1e-3,seed=0"
    run.mkdir()
    found = points(["--weights", str(run), "--drop-loc=(3, 6, 9)", "seed=1,2"])
    assert [point.label for point in found] == ["seed=1", "seed=2"]
    assert found[0].words == ["--weights", str(run), "--drop-loc=(3, 6, 9)", "seed=1"]
    found = points(["--drop-loc", "(3, 6), [2, 4]"])
    assert [point.words for point in found] == [["--drop-loc=(3, 6)"], ["--drop-loc=[2, 4]"]]


@pytest.mark.parametrize("one", ["'a,b.pth'", '"a,b.pth"', "{a:1,b:2}", "[0.9,0.95]"])
def test_a_comma_within_one_value_of_a_flag_lists_no_points(one: str) -> None:
    found = points(["--weights", one, "optimizer.betas=[0.9,0.95]", "text='a,b'"])
    assert [point.words[:2] for point in found] == [["--weights", one]]
    assert [point.label for point in points([f"--weights={one},c"])] != [""]


def test_glob_lists_the_options_of_a_group() -> None:
    found = points(["backbone=glob(hybrid_dinov2*)"])
    assert [point.values["backbone"] for point in found] == [
        *("hybrid_dinov2_vit_base_patch16", "hybrid_dinov2_vit_huge_patch16"),
        *("hybrid_dinov2_vit_large_patch16", "hybrid_dinov2_vit_small_patch16"),
    ]


def test_quotes_belong_to_the_word_and_not_to_the_value() -> None:
    found = points(["text='a,b',\"c d\",e"])
    assert [point.values["text"] for point in found] == ["a,b", "c d", "e"]


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["a.lr=1,2", "b.lr=3"], ["lr=1", "lr=2"]),
        (
            ["a.lr=1,2", "b.lr=3,4"],
            ["a.lr=1,b.lr=3", "a.lr=1,b.lr=4", "a.lr=2,b.lr=3", "a.lr=2,b.lr=4"],
        ),
        (["weights=runs/x/e/t.pth,runs/y/e/t.pth"], ["weights=x", "weights=y"]),
        (["weights='',runs/x/t.pth"], ["weights=_", "weights=runs_x_t.pth"]),
        (["weights=/r/x,/r/x/y"], ["weights=x", "weights=x_y"]),
        (["betas=[0.9,0.95],[0.9,1]"], ["betas=0.9_0.95", "betas=0.9_1"]),
        (["seed=5"], [""]),
        (["+a.lr=1,2", "a.lr=3,4"], ["lr=3", "lr=4"]),
    ],
)
def test_a_label_names_a_folder_and_tells_the_points_apart(
    words: list[str], labels: list[str]
) -> None:
    assert [point.label for point in points(words)] == labels


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr=interval(0,1)", "has no list of values"),
        ("seed=1,1", "two points of the sweep have the same values: seed=1"),
        ("backbone=glob(nix*)", "matches nothing"),
        ("--lr=1,,2", "--lr 1,,2: a value of the list is empty"),
        ("output_dir=a,b", "every point has a folder below output_dir"),
    ],
)
def test_lists_that_cannot_be_tried(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        points([word])
