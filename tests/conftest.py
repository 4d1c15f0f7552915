"""Options and fixtures of all tests: seeds, one thread, and the markers that need a machine."""

import random
import shutil
import signal

import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--parity DIR` runs the parity cases of another folder."""
    parser.addoption(
        "--parity",
        metavar="DIR",
        help="folder of parity topics, or of one (../shared/parity or tests/parity/selection)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """One thread: the tensors here are too small to share, and sums keep their order."""
    # Tests of closed terminals are about runs that heed them; under nohup HUP comes in ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU or a Slurm installation where there is none."""
    lacking = []
    if not torch.cuda.is_available():
        lacking.append(("gpu", pytest.mark.skip(reason="needs a CUDA device")))
    if shutil.which("sbatch") is None:
        lacking.append(("slurm", pytest.mark.skip(reason="needs Slurm's sbatch")))
    for item in items:
        for marker, skip in lacking:
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
