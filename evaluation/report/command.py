"""The command line of experiments/report.py, which answers --help before anything is read."""

from collections.abc import Sequence

from utils.command import Parser, as_command

ABOUT = "Write FOLDER/report.html: one page of what a run or an evaluation left (docs/report.md)."


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. A mistake prints one line, exit code 2."""
    folders, output = _read(argv)
    from evaluation.report.page import write_report  # late: --help answers at once

    for folder in folders:
        path = write_report(folder, output)
        print(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0


def _read(argv: Sequence[str] | None) -> tuple[list[str], str | None]:
    parser = Parser(description=ABOUT, allow_abbrev=False)
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
