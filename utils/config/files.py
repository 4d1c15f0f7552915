"""Find config files, on disk as given or below `configs/`."""

import re
from pathlib import Path
from typing import Any

import yaml

from utils.config.vocabulary import is_dinov2
from utils.errors import UserError
from utils.nearest import nearest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def find_file(file: str | Path) -> Path:
    """The path of a config file, as given or below `configs/`; `.yaml` may be left out.

    UserError if there is no such file, or if a folder on the way cannot be entered.
    """
    try:
        return _found(file)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or file}: {error.strerror}") from None


def backbone_names() -> list[str]:
    """The names of all files in configs/backbone, in order."""
    return sorted(path.stem for path in (CONFIGS / "backbone").glob("*.yaml"))


def backbone_node(name: str) -> dict[str, Any]:
    """The node of a file in configs/backbone."""
    return yaml.safe_load((CONFIGS / "backbone" / f"{name}.yaml").read_text())


def run_of_model(overrides: list[str], runs: str) -> str | None:
    """`runs`/X.yaml for the last override backbone=X that has such a file; None without one."""
    models = [word.removeprefix("backbone=") for word in overrides if word.startswith("backbone=")]
    named = [f"{runs}/{model}.yaml" for model in models if runs]
    return next((file for file in reversed(named) if (CONFIGS / file).is_file()), None)


def chooses_backbone(file: Path, default: str = "") -> bool:
    """Whether a run file, or one that it builds on, chooses a backbone or sets keys of one.

    The net that configs/evaluate.yaml and the like begin with is a default, and no choice; nor is
    that of `default`, the file below `configs/` that the command takes without any. What cannot be
    read chooses none, as the error is for whoever composes it.
    """
    return file != CONFIGS / default and _chooses_backbone(file, (file, CONFIGS / default))


def _chooses_backbone(file: Path, above: tuple[Path, ...]) -> bool:
    # above: the file itself, and those that it is read for; the first is the run file. They, and
    # the command's default among them, are not read again.
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    if not isinstance(content, dict):
        return False
    if content.get("backbone") or is_dinov2(content):
        return True
    entries = content.get("defaults")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            if any(re.match(r"override\s+/?backbone\b", str(key)) for key in entry):
                return True
        elif re.match("/?backbone/", str(entry)):
            return True
        elif entry != "_self_":
            name = f"{str(entry).lstrip('/')}.yaml"
            folders = (above[0].parent, CONFIGS) if str(entry).startswith("/") else (file.parent,)
            below = next((f / name for f in folders if (f / name).is_file()), None)
            if below and below not in above and _chooses_backbone(below, (*above, below)):
                return True
    return False


def _found(file: str | Path) -> Path:
    given = Path(file).expanduser()
    if len(given.name) > 200:  # longer than a file's name may be
        raise UserError(f"there is no config file {str(file)[:60]}...")
    for path in (given, CONFIGS / given):
        for candidate in (path, Path(f"{path}.yaml")):
            if candidate.is_file():
                return candidate.absolute()
    if given.is_dir() or (CONFIGS / given).is_dir():
        folder = given if given.is_dir() else CONFIGS / given
        inside = ", ".join(sorted(path.name for path in folder.glob("*.yaml")))
        raise UserError(
            f"{given} is a folder; give one of its files: {inside or 'it has no .yaml file'}"
        )
    ours = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    beside = {str(path) for path in given.parent.glob("*.y*ml")} if given.parent.is_dir() else set()
    stems = {Path(file).stem for file in ours}
    hint = nearest(given, beside) or nearest(given, ours) or nearest(given.stem, stems)
    raise UserError(f"there is no config file {file}{hint}")
