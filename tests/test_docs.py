"""README and docs tell the truth: links lead somewhere, commands name things that exist."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = ROOT / "configs"
# Files that come to be by running, and names that stand for the reader's own.
MADE = ("runs/", "data/", "dist/", ".venv/", "path/", "my_", "my/", "/", "~", "<", "checkpoints/")
# A first word that makes a backquoted path one of ours.
OURS = {path.name for path in ROOT.iterdir()} - {"runs", "data", ".venv"}

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def fenced(text: str) -> list[str]:
    """The commands of all fenced shell blocks, continued lines joined, comments dropped."""
    commands = []
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ")
            if words and not words.startswith("#"):
                commands.append(words)
    return commands


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for path in PAGES:
        for line in fenced(path.read_text()):
            found.append((path.name, shlex.split(line, comments=True)))
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def help_of(script: str) -> str:
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@page
def test_links_lead_somewhere(path):
    """Every relative link is a file, and its anchor a heading of that file."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{path.name} links to {link}"


@page
def test_named_files_exist(path):
    """A backquoted path into the project exists (`utils/training.py`, `configs/backbone/`)."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for name in re.findall(r"`([\w./*-]+)`", text):
        if name.split("/")[0] not in OURS or ("/" not in name and "." not in name):
            continue
        assert list(ROOT.glob(name.rstrip("/"))), f"{path.name} names {name}"


@page
def test_no_placeholder_is_left(path):
    """Every figure has been measured and filled in."""
    assert not re.search(r"FIGURES_HERE|TODO|TBD|XXX", path.read_text())


def test_make_targets_exist():
    """Every `make x` in the docs is a target, and every target says what it does."""
    used = [word for _, words in commands() if words[0] == "make" for word in words[1:]]
    used += re.findall(r"`make ([a-z-]+)`", "".join(path.read_text() for path in PAGES))
    assert used
    assert {word for word in used if "=" not in word} <= targets()
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {target} " in shown.stdout for target in targets())


def test_commands_name_what_exists():
    """Scripts, their flags, config files and config groups named in a command exist."""
    checked = 0
    for where, words in commands():
        script = next((word for word in words if word.startswith("experiments/")), None)
        if script is None:
            continue
        checked += 1
        place = f"{where}: {shlex.join(words)}"
        assert (ROOT / script).is_file(), place
        arguments = words[words.index(script) + 1 :]
        for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
            assert re.search(rf"{flag}\b", help_of(script)), f"{place}: no flag {flag}"
        for flag, value in zip(arguments, arguments[1:], strict=False):
            if flag == "--config-file" and not value.startswith(MADE):
                assert any((base / value).is_file() for base in (ROOT, CONFIGS)), place
        for group, _, option in (word.partition("=") for word in arguments if "=" in word):
            if (CONFIGS / group).is_dir():
                assert (CONFIGS / group / f"{option}.yaml").is_file(), f"{place}: {group}={option}"
    assert checked


def test_pytest_commands_name_what_exists():
    """Files and folders after `pytest` exist."""
    for where, words in commands():
        if "pytest" in words:
            for word in words[words.index("pytest") + 1 :]:
                if word.startswith("tests/"):
                    assert (ROOT / word.split("::")[0]).exists(), f"{where}: {shlex.join(words)}"


def test_readme_maps_every_folder():
    """The map names each top-level folder of the project."""
    readme = (ROOT / "README.md").read_text()
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"}
    made = {"runs", "data", "build", "dist", "outputs", "wandb"}
    for folder in folders - made:
        if not folder.endswith(".egg-info"):
            assert f"{folder}/" in readme, f"README.md does not say what {folder}/ is"
