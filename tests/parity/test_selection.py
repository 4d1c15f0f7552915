"""The selection in the repository is complete and small."""

import json

from tests.parity.harness import collect, runners
from tests.parity.make_selection import MAX_BYTES, SELECTION, files_of


def test_selection_is_small() -> None:
    """At most 3 MB in all."""
    sizes = [path.stat().st_size for path in SELECTION.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= MAX_BYTES


def test_selection_is_complete() -> None:
    """Every topic has cases and every case its files."""
    cases = collect(SELECTION)
    assert {case.topic for case in cases} == {topic for topic, _ in runners()}
    for path in SELECTION.rglob("index.json"):
        index = json.loads(path.read_text())
        for entry in index["cases"] + index.get("json_cases", []):
            for name in files_of(entry, index):
                assert (path.parent / name).is_file(), f"{entry['name']} lacks {name}"
