"""One test per stored case below --parity, and a summary line per topic."""

from collections import Counter
from pathlib import Path

import pytest

from tests.parity.harness import HERE, collect

ROOT = HERE.parents[1]
DEFAULTS = (ROOT.parent / "shared" / "parity", HERE / "selection")
TESTS = "tests/parity/test_parity.py::test_case["


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `parity_case` with the cases of the asked folder, or the first default found."""
    if "parity_case" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("parity")
    try:
        cases = collect(Path(asked) if asked else next(path for path in DEFAULTS if path.is_dir()))
    except ValueError as error:
        raise pytest.UsageError(f"--parity: {error}") from error
    metafunc.parametrize("parity_case", cases, ids=[case.id for case in cases])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Cases passed, failed and not built, per topic."""
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            if report.nodeid.startswith(TESTS) and (report.when == "call" or outcome != "passed"):
                topic = report.nodeid.removeprefix(TESTS).split("/")[0]
                counts.setdefault(topic, Counter())[outcome] += 1
    if not counts:
        return
    terminalreporter.section("parity with the published code")
    for topic, count in sorted(counts.items()):
        passed, failed, not_built = (
            count["passed"],
            count["failed"] + count["error"],
            count["skipped"],
        )
        terminalreporter.line(
            f"{topic:<16} {passed:>3} passed  {failed:>3} failed  {not_built:>3} not built yet"
        )
