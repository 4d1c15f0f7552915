"""Write FOLDER/report.html: one page of what a run or an evaluation left, to read or pass on."""

from evaluation.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
