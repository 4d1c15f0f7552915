"""What nets cost beside their plain twins: [--amp] [--compile] [--graphs] [--models A,B]."""

from evaluation.commands.complexity import parse_complexity
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.cost.complexity.measure", parse_complexity)
