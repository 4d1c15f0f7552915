"""The harness finds the right runner and lets no wrong number through."""

import json

import pytest
import torch

from tests.parity.harness import Case, NotBuilt, check, collect, find_runner


def case(name: str, **entry) -> Case:
    return Case("topic", None, {"name": name, **entry})


def test_runner_by_name_kind_and_prefix():
    """Name before kind before the longest prefix before whatever is left."""
    known = {("topic", key): key for key in ("exact", "kind", "long_*", "long_er_*", "*")}
    assert find_runner(case("exact", kind="kind"), known) == "exact"
    assert find_runner(case("long_er_1", kind="kind"), known) == "kind"
    assert find_runner(case("long_er_1"), known) == "long_er_*"
    assert find_runner(case("other", kind="unknown"), known) == "*"
    with pytest.raises(NotBuilt):
        find_runner(case("other"), {("another", "*"): "no"})


@pytest.mark.parametrize(
    ("metric", "tol", "fine", "wrong"),
    [
        ("relative", 1e-3, 2.001, 2.003),
        ("floored", 1e-3, 2.001, 2.003),
        ("absolute", 1e-3, 2.0009, 2.002),
        ("close", {"atol": 1e-3, "rtol": 1e-3}, 2.002, 2.004),
        ("exact", None, 2.0, 2.0000002),
    ],
)
def test_check_draws_the_line(metric, tol, fine, wrong):
    """Just within passes; just without, NaN and another shape do not."""
    stored = torch.tensor([1.0, 2.0])
    check("x", torch.tensor([1.0, fine]), stored, tol, metric)
    for value in (wrong, float("nan")):
        with pytest.raises(AssertionError):
            check("x", torch.tensor([1.0, value]), stored, tol, metric)
    with pytest.raises(AssertionError):
        check("x", torch.tensor([1.0, 2.0, 2.0]), stored, tol, metric)


def test_exact_takes_plain_values():
    """Lists and strings are compared as they are."""
    check("x", ["a", 1], ["a", 1], None, "exact")
    with pytest.raises(AssertionError):
        check("x", ["a", 1], ["a", 2], None, "exact")


def test_collect_reads_topics_and_single_folders(tmp_path):
    """A folder of topics and one topic alone; a folder without an index is an error."""
    for topic in ("one", "two"):
        folder = tmp_path / topic
        folder.mkdir()
        index = {"topic": topic, "cases": [{"name": "a"}], "json_cases": [{"name": "b"}]}
        (folder / "index.json").write_text(json.dumps(index))
    assert [found.id for found in collect(tmp_path)] == ["one/a", "one/b", "two/a", "two/b"]
    assert [found.id for found in collect(tmp_path / "two")] == ["two/a", "two/b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no index\.json"):
        collect(tmp_path / "empty")
