"""The whole speed table of this machine: every measurement of a list, one after the other."""

from evaluation.commands.speed import main

if __name__ == "__main__":
    raise SystemExit(main())
