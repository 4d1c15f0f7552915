"""Every command ends alike: one line and an exit code of its own for a mistake, an interrupt."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.command import Parser, as_command
from utils.errors import UserError

ROOT = Path(__file__).parents[2]


def _mistake() -> None:
    raise UserError("the moon\nis away")


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (_mistake, 2, "error: the moon is away\n"),
        (_interrupt, 130, "interrupted\n"),
        (lambda: Path(__file__, "file").touch(), 2, f"error: {__file__}/file: Not a directory\n"),
    ],
)
def test_a_mistake_and_an_interrupt_are_one_line(work, code, said, capsys) -> None:
    with pytest.raises(SystemExit) as left, as_command():
        work()
    assert left.value.code == code and capsys.readouterr().err == said


def test_other_errors_are_raised_on() -> None:
    with pytest.raises(ZeroDivisionError), as_command():
        _ = 1 / 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize(
    ("work", "output", "code", "said"),
    [
        ("print('x')", "full", 1, "standard output takes no more: No space left on device"),
        ("print('x' * 10_000)", "full", 1, "standard output takes no more: No space left"),
        ("print('x', flush=True)", "full", 1, "standard output takes no more: No space left"),
        (
            "print('x'); raise OSError(28, 'No space left on device', 'a.json')",
            "null",
            2,
            "a.json: No space left on device; what was written before stays",
        ),
    ],
)
def test_a_full_disk_is_one_line_and_standard_output_is_told_apart(
    work: str, output: str, code: int, said: str
) -> None:
    program = f"from utils.command import as_command\nwith as_command(): {work}"
    words = ["sh", "-c", f'exec "$0" -c "$1" >/dev/{output}', sys.executable, program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


def test_a_short_usage_is_told_with_a_mistake_in_the_words() -> None:
    parser = Parser(prog="pack")
    parser.add_argument("folder")
    with pytest.raises(UserError, match=r"required: folder; usage: pack \[-h\] folder$"):
        parser.parse_args([])
    for number in range(10):
        parser.add_argument(f"--number-{number}")
    with pytest.raises(UserError, match="required: folder$"):
        parser.parse_args([])
