"""The machine that a speed was measured on: device, versions, driver, revision of the code.

Run as a program it prints them as JSON, so that a process that only starts others holds no device.
"""

import json
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from evaluation.cost.peaks import device_name
from utils.data.loaders import available_cores
from utils.errors import UserError
from utils.precision import auto_mode
from utils.run_folder import describe_code

ROOT = Path(__file__).resolve().parents[2]


def ask() -> dict[str, Any]:
    """Get the facts of this machine from a separate process; UserError if that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.cost.machine"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"torch says: {(done.stderr.splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def describe(device: torch.device) -> dict[str, Any]:
    """A device, versions and the code's revision."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "code": describe_code(),
    }


def _facts() -> dict[str, Any]:
    """All that there is to tell; None for what is not there."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        **describe(torch.device(kind)),
        "auto_precision": auto_mode(kind),
        "driver": _driver() if kind == "cuda" else None,
        "triton": _version("triton"),
        "cores": available_cores(),
    }


def in_words(facts: dict[str, Any]) -> str:
    """The facts as a line."""
    parts = [facts["device"], f"{facts['cores']} cores", f"Python {facts['python']}"]
    parts += [f"{name} {facts[name]}" for name in ("torch", "triton", "timm") if facts[name]]
    if facts["driver"]:
        parts.append(f"driver {facts['driver']}")
    return ", ".join([*parts, f"code {facts['code'].partition(' ')[0]}"])


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return said.stdout.partition("\n")[0].strip() or None
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(_facts()))
