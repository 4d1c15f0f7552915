"""Words of a command are sorted, and a flag that nobody reads is named."""

import pytest

from utils.config.command_line import Option, Takes, backbone_words, read_words, sorted_words
from utils.config.flags import FLAGS
from utils.errors import UserError

OPTIONS = {"--feature": Option("feature", "what is read")}
TAKES: dict[str, Takes] = {"--on": 0, "--one": 1, "--two": 2, "--all": str.isdecimal, "--may": None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["OUT", "--faeture", "cls"], "unknown flag --faeture; did you mean '--feature'?"),
        (["--featur=cls", "OUT"], "unknown flag --featur; did you mean '--feature'?"),
        (["OUT", "--old", "--otput-dir", "x"], "unknown flag --otput-dir; did you mean '--output-"),
        # No flag of a training is offered to a command that is none.
        (["OUT", "--bce-los"], "unknown flag --bce-los; --help lists the flags"),
    ],
)
def test_a_misspelt_flag_is_named_before_its_value_is_a_word_too_many(words, said):
    with pytest.raises(UserError) as error:
        read_words(words, OPTIONS, ignored={"--old": "it is"}, num_places=1)
    assert str(error.value).startswith(said)


def test_flags_of_all_scripts_pass_with_their_values():
    words = [
        part
        for flag in FLAGS
        for name in flag.names
        for part in ([name] if flag.kind is None else [name, "1"])
    ]
    words += ["--check", "--config-file", "x.yaml"]
    found = read_words(["OUT", *words], OPTIONS, num_places=1)
    assert found.places == ["OUT"] and found.overrides == words


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("--on --one x --two x y", [("--on", []), ("--one", ["x"]), ("--two", ["x", "y"])]),
        ("-1 -2 k=v", [("--one", ["-2"]), ("", ["k=v"])]),
        # What may follow decides how many values are taken; behind an = there is one alone.
        ("--all 1 2 OUT", [("--all", ["1", "2"]), ("", ["OUT"])]),
        ("--all=1 2", [("--all", ["1"]), ("", ["2"])]),
        ("--may x --may=x", [("--may", []), ("", ["x"]), ("--may", ["x"])]),
        # A flag of all scripts keeps its value beside it, whatever the value looks like.
        ("--name --on --on", [("", ["--name", "--on"]), ("--on", [])]),
    ],
)
def test_flags_take_as_many_words_as_they_say(line, found):
    assert [*sorted_words(line.split(), TAKES, same={"-1": "--one"})] == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--one", "--one needs a value: a number"),
        ("--one=", "--one needs a value: a number"),
        ("--one --on", "--one needs a value: a number"),
        ("--one -1 2", "--one needs a value: a number"),
        ("--two x", "--two needs 2 values"),
        ("--two=x", "--two needs 2 values"),
        ("--all OUT --all", "--all needs a value"),
        ("--may=", "--may needs a value"),
        ("--on=x", "--on takes no value, got 'x'"),
    ],
)
def test_a_flag_without_its_values_is_refused(line, said):
    with pytest.raises(UserError) as error:
        [*sorted_words(line.split(), TAKES, same={"-1": "--one"}, told={"--one": "a number"})]
    assert str(error.value) == said


def test_a_net_beside_the_run_file_is_a_model_too(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "mine.yaml").touch()
    (tmp_path / "run.yaml").touch()
    words = ["--config-file", str(tmp_path / "run.yaml")]
    assert backbone_words("mine", words) == ["backbone=mine"]
    with pytest.raises(UserError, match="--model: there is no model 'mine'"):
        backbone_words("mine", [])
