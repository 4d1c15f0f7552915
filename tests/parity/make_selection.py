"""Makes tests/parity/selection from the full folder of stored cases.

    python -m tests.parity.make_selection ../shared/parity

The selection lets a clone prove parity alone, in every topic. Of the cases that the project runs it
takes the smallest of each sort first and then whatever is small, until `MAX_BYTES` are used.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.parity.harness import HERE, Case, NotBuilt, collect, find_runner, runners

SELECTION = HERE / "selection"
MAX_BYTES = 3_000_000

# Cases that a runner declines.
DECLINED = {"deit_hybrid_frozen_tokens_nonzero", "slurm_node_list"}
# Files that no case names but tests or runners read.
EXTRA = {"octic": ["checkpoint_layouts.json"]}
PARTS = ("cases", "json_cases")


def files_of(entry: dict[str, Any], index: dict[str, Any]) -> list[str]:
    """Names of the files of a case, whichever way its topic writes them, its model's among them."""
    named = entry.get("files", entry.get("file", []))
    if isinstance(named, dict):
        named = list(named.values())
    model = index.get("models", {}).get(entry.get("model"), {})
    weights = [value for value in model.values() if str(value).endswith(".safetensors")]
    return [*([named] if isinstance(named, str) else named), *weights]


def sort_of(case: Case) -> str:
    """What kind of thing a case computes."""
    entry = case.entry
    reference = entry.get("reference", "")
    if isinstance(reference, dict):
        reference = reference.get("class", reference.get("function", ""))
    return f"{case.topic} {entry.get('kind')} {entry.get('method')} {reference}"


def choose(source: Path) -> Iterator[Case]:
    """The cases of the selection."""
    known = runners()
    indices = {path.parent: json.loads(path.read_text()) for path in source.rglob("index.json")}
    kept: set[Path] = {source / topic / name for topic, names in EXTRA.items() for name in names}
    used = sum(path.stat().st_size for path in kept)
    used += sum(len(_written(_without_cases(index))) for index in indices.values())

    def cost(case: Case) -> tuple[int, set[Path]]:
        index = indices[case.folder]
        files = {case.folder / name for name in files_of(_entry(case, index), index)} - kept
        own = len(_written(_entry(case, index))) + 1
        return own + sum(path.stat().st_size for path in files), files

    runnable = [case for case in collect(source) if _runs(case, known)]
    waiting = sorted(runnable, key=lambda case: (cost(case)[0], case.id))
    sorts: set[str] = set()
    chosen: set[str] = set()
    for is_first in (True, False):
        for case in waiting:
            if case.id in chosen or is_first and sort_of(case) in sorts:
                continue
            size, files = cost(case)
            if used + size <= MAX_BYTES:
                used, kept = used + size, kept | files
                sorts.add(sort_of(case))
                chosen.add(case.id)
                yield case


def _runs(case: Case, known: dict[Any, Any]) -> bool:
    if case.entry["name"] in DECLINED or case.entry.get("kind") == "table":  # in the index anyway
        return False
    try:
        find_runner(case, known)
    except NotBuilt:
        return False
    return True


def _entry(case: Case, index: dict[str, Any]) -> dict[str, Any]:
    """The entry as the index has it."""
    entries = [entry for part in PARTS for entry in index.get(part, [])]
    return next(entry for entry in entries if entry["name"] == case.entry["name"])


def _without_cases(index: dict[str, Any]) -> dict[str, Any]:
    return {key: [] if key in PARTS else value for key, value in index.items()}


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    """Write the selection anew from the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of all topics")
    source = parser.parse_args().source
    chosen, everything = {case.id for case in choose(source)}, collect(source)
    shutil.rmtree(SELECTION, ignore_errors=True)
    for path in sorted(source.rglob("index.json")):
        index = json.loads(path.read_text())
        topic = index.get("topic", path.parent.name)
        target = SELECTION / topic
        target.mkdir(parents=True)
        names = set(EXTRA.get(topic, []))
        for part in PARTS:
            if part in index:
                index[part] = [e for e in index[part] if f"{topic}/{e['name']}" in chosen]
                names |= {name for entry in index[part] for name in files_of(entry, index)}
        for name in names:
            shutil.copyfile(path.parent / name, target / name)
        (target / "index.json").write_text(_written(index) + "\n")
        total = sum(case.topic == topic for case in everything)
        print(f"{topic}: {sum(name.startswith(f'{topic}/') for name in chosen)} of {total} cases")
    size = sum(path.stat().st_size for path in SELECTION.rglob("*") if path.is_file())
    print(f"{SELECTION}: {size:,} bytes of {MAX_BYTES:,}")


if __name__ == "__main__":
    main()
