"""A throwaway Slurm for the tests that are marked `slurm`."""

import os
from collections.abc import Iterator

import pytest
from filelock import FileLock

from slurm.testbed import lacking
from tests.slurm.cluster import FOLDER, ROOT, tell


@pytest.fixture(scope="session")
def standing() -> Iterator[None]:
    """The testbed, for the time of the tests; another run's tests wait for it."""
    if missing := lacking():
        pytest.skip(f"needs {', '.join(missing)}: see docs/launching.md")
    if os.geteuid():
        pytest.skip("needs root, as the daemons of a Slurm do")
    with FileLock(f"{FOLDER}.lock", timeout=300):
        try:
            tell("down")
            done = tell("up")
            assert done.returncode == 0, done.stdout + done.stderr
            yield
        finally:
            tell("down")


@pytest.fixture
def cluster(standing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of somebody who submits to it."""
    monkeypatch.setenv("SLURM_CONF", f"{FOLDER}/slurm.conf")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
