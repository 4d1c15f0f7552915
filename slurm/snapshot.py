"""A copy of the code, taken at submission: what was submitted is what runs, also after a requeue.

It holds the files that git tracks or would track, without tests and documentation, in a folder
that is named after a hash of its content, so that the same code is copied once. `REVISION` names
the git revision.
"""

import hashlib
import os
import shutil
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from utils.revision import NOTE, revision
from utils.run_files import CHECKPOINTS, CONFIG, LAUNCHES, LOCK, METRICS

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 1_000_000  # of a file: code and configs are smaller
MANY_BYTES = 30_000_000  # of all files: more than ten times what this repository has
_LEFT_OUT = {"tests", "docs", "runs", "data", "outputs", "wandb", "checkpoints", "build", "dist"}


class Snapshot:
    """The code of a checkout as it is now; nothing is copied before `write`."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        sizes = {name: (path, path.stat().st_size) for name, path in _files(root)}
        self.sizes = {name: size for name, (_, size) in sizes.items() if size <= MAX_BYTES}
        self.files = {name: sizes[name][0] for name in self.sizes}
        self.too_large = sorted(sizes.keys() - self.sizes.keys())
        digest = hashlib.sha256()
        for name, path in sorted(self.files.items()):
            digest.update(os.fsencode(f"{name}\0{path.stat().st_size}\0"))
            digest.update(path.read_bytes())
        self.name = digest.hexdigest()[:12]

    def write(self, folder: Path) -> bool:
        """Copy to `folder`, which exists whole or not at all; False if it was there."""
        if folder.exists():
            return False
        partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        for name, path in self.files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        (partial / NOTE).write_text(revision(self.root) + "\n")
        try:
            partial.rename(folder)
        except OSError:  # another submission was faster
            shutil.rmtree(partial)
            return False
        return True

    def notes(self) -> list[str]:
        """Notes for the user: files too large to copy, or a copy so large that it seems data."""
        found = []
        if self.too_large:
            found.append(f"note: not copied, over 1 MB: {_shown(', '.join(self.too_large))}")
        if (total := sum(self.sizes.values())) > MANY_BYTES:
            shares: Counter[str] = Counter()
            for name, size in self.sizes.items():
                shares.update({parent.as_posix(): size for parent in list(Path(name).parents)[:-1]})
            # Among folders of equal size the innermost one is the most precise.
            folder = max(shares, key=lambda name: (shares[name], name.count("/")))
            found.append(
                f"note: the job's copy of the code has {total / 1e6:.0f} MB in {len(self.sizes):,} "
                f"files, {shares[folder] / 1e6:.0f} MB of them in {_shown(folder)}: is that code? "
                "What git ignores is not copied"
            )
        return found


def _shown(name: str) -> str:
    """Text that can be printed, of names that need not be UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    is_run = cache(lambda folder: _is_run(root / folder))
    for name in sorted(set(_known_to_git(root) or _found(root))):
        parts = Path(name).parts
        kept = len(parts) > 1 and parts[0] not in _LEFT_OUT and parts[0][0] != "."
        kept = kept and not any(is_run(folder) for folder in list(Path(name).parents)[:-1])
        if kept and (root / name).is_file():
            yield name, root / name


def _is_run(folder: Path) -> bool:
    """Whether it is the folder of a run or of a sweep, which holds results and no code."""
    if (folder / LAUNCHES).exists() or any(folder.glob(f"code/*/{NOTE}")):
        return True
    marks = (LOCK, CONFIG, METRICS)
    return (folder / CHECKPOINTS).is_dir() and any((folder / mark).exists() for mark in marks)


def _known_to_git(root: Path) -> list[str]:
    """Tracked files, and new ones that are not ignored; empty if there is no git checkout."""
    words = ["ls-files", "--cached", "--others", "--exclude-standard", "-z", "--full-name"]
    inside = _git(root, "rev-parse", "--show-prefix")
    # A folder inside somebody else's repository is no checkout of ours.
    return [] if inside is None or inside.strip() else (_git(root, *words) or "").split("\0")[:-1]


def _found(root: Path) -> list[str]:
    endings = {".py", ".yaml", ".yml", ".json", ".sh", ".css", ".js", ".html", ".toml"}
    return [
        path.relative_to(root).as_posix()
        for folder in root.iterdir()
        if folder.is_dir() and folder.name not in _LEFT_OUT and folder.name[0] != "."
        for path in folder.rglob("*")
        if path.suffix in endings and "__pycache__" not in path.parts
    ]


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(done.stdout)  # names of files need not be UTF-8
