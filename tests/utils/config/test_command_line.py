"""Words of a command are sorted, and a flag that nobody reads is named."""

import pytest

from utils.config.command_line import Option, read_words
from utils.config.flags import FLAGS
from utils.errors import UserError

OPTIONS = {"--feature": Option("feature", "what is read")}


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
