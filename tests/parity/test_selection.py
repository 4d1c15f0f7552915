"""The selection in the repository is complete and small."""

from tests.parity.harness import collect
from tests.parity.make_selection import MAX_BYTES, SELECTION, TOPICS, files_of


def test_selection_is_small() -> None:
    """At most 3 MB in all."""
    sizes = [path.stat().st_size for path in SELECTION.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= MAX_BYTES


def test_selection_is_complete() -> None:
    """Every topic has cases and every case its files."""
    cases = collect(SELECTION)
    assert {case.topic for case in cases} == TOPICS.keys()
    for case in cases:
        for name in files_of(case.entry):
            assert (case.folder / name).is_file(), f"{case.id} lacks {name}"
