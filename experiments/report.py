"""Write FOLDER/report.html: one page of what a run or an evaluation left, to read or pass on."""

import sys

from utils.config import fail
from utils.errors import UserError

USAGE = "usage: report.py FOLDER [FOLDER ...]"

if __name__ == "__main__":
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n\n{USAGE}")
        raise SystemExit(0)
    unknown = next((word for word in words if word.startswith("-")), None)
    if unknown or not words:
        fail(f"unknown flag {unknown}; {USAGE}" if unknown else f"which folder? {USAGE}")
    from evaluation.report.page import write_report  # late: --help answers at once

    for folder in words:
        try:
            path = write_report(folder)
        except UserError as error:
            fail(error)
        print(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)")
