"""A wheel of the project carries octic and vit alone, and works where nothing else is installed."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["octic", "vit", "pyproject.toml", "README.md", "LICENSE"]

USE = """
import sys
from octic import OcticVisionTransformer
import timm, torch, vit
model = timm.create_model(
    "hybrid_deit_small_patch16", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4
)
assert isinstance(model, OcticVisionTransformer)
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
foreign = {"utils", "dinov2", "evaluation", "slurm", "hydra", "omegaconf", "submitit", "rich"}
assert not foreign & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-q", "-w", target, copy], check=True, timeout=300)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_two_packages(wheel):
    """octic and vit with all their modules, the licence, and nothing of the framework."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"octic", "vit"}
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("octic", "vit")
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_imports_in_an_empty_environment(wheel, tmp_path):
    """Beside the wheel only what it declares, and what that declares, can be imported."""
    site = tmp_path / "site"
    site.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    (metadata,) = site.glob("*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line]
    for name in closure(needed):
        show(name, site)
    # -S: neither this environment's packages nor the checkout; -I: no variables, no current folder.
    program = f"import sys; sys.path.insert(0, {str(site)!r})\n{USE}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def closure(requirements: list[str]) -> set[str]:
    """Names of all distributions that requirements without extras lead to."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or requirement.name in found:
            continue
        try:
            waiting += distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue  # optional on this platform
        found.add(requirement.name)
    return found


def show(name: str, site: Path) -> None:
    """Link everything a distribution installed at top level into `site`."""
    installed = distribution(name)
    for file in installed.files or []:
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not (site / top).exists():
            (site / top).symlink_to(Path(str(installed.locate_file(top))).resolve())
