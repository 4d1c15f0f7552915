"""Who may import whom, what may be imported when a module loads, and how long a file may grow."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder -> our folders it may import besides itself. Recipes and backbones reach `experiments`
# through configs only.
MAY_IMPORT: dict[str, set[str]] = {
    "utils": set(),
    "vit": set(),
    "octic": {"vit"},
    "baselines": {"octic", "vit", "utils"},
    "deit": {"vit", "utils"},
    "dinov2": {"vit", "utils"},
    "evaluation": {"vit", "utils"},
    "slurm": {"utils"},
    "experiments": {"slurm", "evaluation", "utils"},
}
# Folder of `evaluation` -> its other folders that it may import; modules at its root are for all.
EVALUATION_MAY_IMPORT: dict[str, set[str]] = {
    "cost": set(),
    "features": set(),
    "report": set(),
    "probes": {"cost", "features"},
    "pictures": {"features", "probes"},
    "segmentation": {"features", "pictures", "probes"},
    "symmetry": {"features", "pictures", "probes"},
    "comparison": {
        *("cost", "features", "pictures", "probes", "report", "segmentation", "symmetry"),
    },
    "commands": {"cost"},
}
# What the wheel declares, and what the framework around it may use besides ("torch>=2.11": torch).
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
IMPORTED_AS = {"hydra-core": "hydra", "pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}


def imported_names(requirements: list[str]) -> set[str]:
    """The module each requirement offers."""
    names = {re.split(r"[<>=!~ \[;]", requirement)[0] for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in names}


WHEEL_NEEDS = imported_names(PROJECT["dependencies"])
FRAMEWORK_NEEDS = imported_names(EXTRAS["train"])
# Configuration and launching stay where they belong: a machine without these can still train.
CONFIG_HOMES = (
    "utils/config/compose.py",
    "utils/config/overrides.py",
    "utils/config/check.py",
    "utils/config/vocabulary.py",
    "slurm/",
    "experiments/",
)
ONLY_IN: dict[str, tuple[str, ...]] = {
    "hydra": CONFIG_HOMES,
    "omegaconf": CONFIG_HOMES,
    "submitit": ("slurm/", "experiments/"),
}
# Imported inside the function that uses them. Triton alone wants modules of its own: kernels are
# written at the top of `octic/triton_*.py`, and these in turn are imported late.
OPTIONAL = {
    *("wandb", "tensorboard", "xformers", "fvcore", "triton", "lmdb"),
    *("onnx", "onnxruntime", "onnxscript", "huggingface_hub"),
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LINES = {"utils/training.py": 120}

SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
LOADABLE = [path for path in SOURCES if not path.name.startswith("triton_")]
PACKAGES = [folder for folder in MAY_IMPORT if (ROOT / folder / "__init__.py").is_file()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module of a tree with its statement; a relative import counts as '.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("." if node.level else node.module or "."), node


def runs_on_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run whenever the module loads, also those in classes and plain `with`."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.ClassDef | ast.With):
            waiting += node.body


def first_line(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Where the code of a function begins: a long list of options is no long function."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[0].lineno if body else function.lineno


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_import_direction(path: Path) -> None:
    """A folder imports only the folders below it, and packages that pyproject.toml declares."""
    folder = name_of(path).split("/")[0]
    tree = ast.parse(path.read_text())
    for module, node in imports(tree):
        where = f"{name_of(path)}:{node.lineno} imports {module}"
        top = module.split(".")[0]
        assert module != ".", f"{where}: relative imports hide the direction"
        if top in MAY_IMPORT:
            allowed = MAY_IMPORT[folder] | {folder}
            assert top in allowed, f"{where}; {folder} may import {sorted(allowed)}"
        elif top not in sys.stdlib_module_names:
            declared = WHEEL_NEEDS | OPTIONAL
            if folder not in ("octic", "vit"):
                declared = declared | FRAMEWORK_NEEDS
            assert top in declared, f"{where}, which pyproject.toml does not declare for it"
        homes = ONLY_IN.get(top)
        assert homes is None or name_of(path).startswith(homes), f"{where}; it belongs in {homes}"
        star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
        assert not star, f"{where} with a star"


@pytest.mark.parametrize("folder", EVALUATION_MAY_IMPORT)
def test_import_direction_within_evaluation(folder: str) -> None:
    """Probes know no pictures, pictures no segmentation, and what is compared no comparison."""
    allowed = EVALUATION_MAY_IMPORT[folder] | {folder}
    for path in (ROOT / "evaluation" / folder).rglob("*.py"):
        for module, node in imports(ast.parse(path.read_text())):
            package, _, rest = module.partition(".")
            target = rest.split(".")[0]
            if package == "evaluation" and target in EVALUATION_MAY_IMPORT:
                where = f"{name_of(path)}:{node.lineno} imports {module}"
                assert target in allowed, f"{where}; {folder} may import {sorted(allowed)}"


def test_every_folder_of_evaluation_has_its_place() -> None:
    folders = {path.parent.name for path in (ROOT / "evaluation").glob("*/__init__.py")}
    assert folders == EVALUATION_MAY_IMPORT.keys()


def test_command_lines_are_read_without_torch() -> None:
    """`--help` and a refused flag answer at once; torch takes seconds to import."""
    modules = [
        name_of(path).removesuffix(".py").replace("/", ".")
        for path in (ROOT / "evaluation" / "commands").glob("*.py")
    ]
    program = (
        "import sys, importlib\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", LOADABLE, ids=name_of)
def test_optional_packages_are_imported_late(path: Path) -> None:
    """No module needs wandb, xformers, triton and the like to be imported."""
    for statement in runs_on_import(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for module, _ in imports(statement):
                where = f"{name_of(path)}:{statement.lineno} imports {module} when it loads"
                late = module.split(".")[0] in OPTIONAL or module.startswith("octic.triton_")
                assert not late, f"{where}; import it in its function"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=name_of)
def test_init_holds_no_logic(path: Path) -> None:
    """An `__init__.py` is a docstring and at most imports and `__all__`."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name_of(path)} says nothing about the package"
    for node in tree.body[1:]:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_all or isinstance(node, ast.Import | ast.ImportFrom), (
            f"{name_of(path)}:{node.lineno} holds more than imports and __all__"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path: Path) -> None:
    """Files and functions stay short enough to read; the loop stays prose."""
    text = path.read_text()
    limit = MAX_LINES.get(name_of(path), MAX_FILE_LINES)
    assert text.count("\n") <= limit, f"{name_of(path)} has more than {limit} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - first_line(node) + 1
            assert length <= MAX_FUNCTION_LINES, (
                f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_ours(package: str) -> None:
    """A foreign `utils` or `evaluation` earlier on the path would be imported in silence."""
    found = [Path(entry).resolve() for entry in importlib.import_module(package).__path__]
    assert found == [ROOT / package]


def test_experiments_hold_no_module_named_like_a_package() -> None:
    """`python experiments/x.py` puts experiments/ first on the path, so a `utils.py` would win."""
    stems = {path.stem for path in (ROOT / "experiments").glob("*")}
    assert not stems & MAY_IMPORT.keys()


def test_every_module_imports_without_optional_packages() -> None:
    """The library loads where wandb, triton, xformers, hydra, submitit, ... are not installed."""
    modules = [
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in LOADABLE
    ]
    blocked = sorted(OPTIONAL | ONLY_IN.keys())
    program = (
        "import sys, importlib\n"
        "import torch, timm\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
