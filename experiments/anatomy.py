"""What the speed of a net is made of: its blocks, how cost grows, the least a chip could take."""

from evaluation.commands.anatomy import main

if __name__ == "__main__":
    raise SystemExit(main())
