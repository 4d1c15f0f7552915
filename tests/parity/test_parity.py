"""Every stored case of the published code passes within its tolerance, or is not built yet."""

import pytest

from tests.parity.harness import Case, NotBuilt, find_runner, runners


def test_case(parity_case: Case) -> None:
    """Our code gives the stored numbers of one case."""
    try:
        find_runner(parity_case, runners())(parity_case.entry, parity_case.folder)
    except NotBuilt as reason:
        pytest.skip(f"not built yet: {reason}")
