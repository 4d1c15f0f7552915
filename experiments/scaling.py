"""What ranks send each other, measured on this machine, and a model of a step on many GPUs."""

from evaluation.commands.scaling import main

if __name__ == "__main__":
    raise SystemExit(main())
