"""Write FOLDER/report.html: one page of what a run or an evaluation left, to read or pass on."""

import sys

from utils.errors import UserError, fail

USAGE = "usage: report.py FOLDER [FOLDER ...] [--output FILE]"
HELP = "--output FILE: write the page of one FOLDER there, as where FOLDER may not be written to"


def read_words(words: list[str]) -> tuple[list[str], str | None]:
    """The folders, and the file to write to, if one is given; UserError for any other word."""
    folders: list[str] = []
    output = None
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, _, value = word.partition("=")
        if name == "--output":
            output = value or (waiting.pop(0) if waiting else "")
            if not output:
                raise UserError(f"--output needs a file; {USAGE}")
        elif word.startswith("-"):
            raise UserError(f"unknown flag {word}; {USAGE}")
        else:
            folders.append(word)
    if not folders:
        raise UserError(f"which folder? {USAGE}")
    if output and len(folders) > 1:
        raise UserError(f"--output is the page of one folder, not of {len(folders)}; {USAGE}")
    return folders, output


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n\n{USAGE}\n{HELP}")
        raise SystemExit(0)
    try:
        folders, output = read_words(sys.argv[1:])
        from evaluation.report.page import write_report  # late: --help answers at once

        for folder in folders:
            path = write_report(folder, output)
            print(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    except UserError as error:
        fail(error)
