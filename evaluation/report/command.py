"""The command line of experiments/report.py, which answers --help before anything is read."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from utils.console import output_taken
from utils.errors import UserError, fail

ABOUT = "Write FOLDER/report.html: one page of what a run or an evaluation left (docs/report.md)."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {' '.join(self.format_usage().split())}")


@output_taken()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. A mistake prints one line, exit code 2."""
    try:
        folders, output = _read(argv)
        from evaluation.report.page import write_report  # late: --help answers at once

        for folder in folders:
            path = write_report(folder, output)
            print(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    except UserError as error:
        fail(error)
    return 0


def _read(argv: Sequence[str] | None) -> tuple[list[str], str | None]:
    parser = _Parser(description=ABOUT, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run or an evaluation")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the page of one FOLDER there, as where FOLDER may not be written to",
    )
    words = parser.parse_args(argv)
    if words.output == "":
        parser.error("--output needs a file")
    if words.output and len(words.folders) > 1:
        parser.error(f"--output is the page of one folder, not of {len(words.folders)}")
    return words.folders, words.output
