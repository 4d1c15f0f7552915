"""A copy of the code, taken at submission: what was submitted is what runs, also after a requeue.

It holds the files that git tracks or would track, without tests and documentation, in a folder
that is named after its content, so that the same code is copied once. `REVISION` says what git
called it.
"""

import hashlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REVISION = "REVISION"
MAX_BYTES = 1_000_000  # of a file: code and configs are smaller
_LEFT_OUT = {"tests", "docs", "runs", "data", "outputs", "wandb", "checkpoints", "build", "dist"}


class Snapshot:
    """The code of a checkout as it is now; nothing is copied before `write`."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.files = {name: path for name, path in _files(root) if path.stat().st_size <= MAX_BYTES}
        self.too_large = sorted(name for name, _ in _files(root) if name not in self.files)
        digest = hashlib.sha256()
        for name, path in sorted(self.files.items()):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
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
        (partial / REVISION).write_text(_revision(self.root) + "\n")
        try:
            partial.rename(folder)
        except OSError:  # another submission was faster
            shutil.rmtree(partial)
            return False
        return True


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for name in sorted(set(_known_to_git(root) or _found(root))):
        parts = Path(name).parts
        kept = len(parts) > 1 and parts[0] not in _LEFT_OUT and parts[0][0] != "."
        if kept and (root / name).is_file():
            yield name, root / name


def _known_to_git(root: Path) -> list[str]:
    """Tracked files, and new ones that are not ignored; nothing where there is no git."""
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


def _revision(root: Path) -> str:
    noted = root / REVISION
    if noted.is_file():  # a snapshot that submits further jobs
        return noted.read_text().strip()
    said = _git(root, "describe", "--always", "--dirty", "--abbrev=40")
    return (said or "").strip() or "unknown revision"


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
