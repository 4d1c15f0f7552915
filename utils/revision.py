"""Which revision of the code this is: what git says, or the note beside a copy of it."""

import subprocess
from pathlib import Path

NOTE = "REVISION"  # in the copy of the code that a Slurm job runs, which is no checkout


def revision(root: Path) -> str:
    """Git revision of the checkout `root`, with -dirty if changed, or what its `NOTE` says."""
    noted = root / NOTE
    if noted.is_file():
        return noted.read_text().strip()
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown revision"
    return said.strip()
