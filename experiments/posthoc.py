"""Make a trained classifier invariant by each aggregator: --model NAME --model_path FILE."""

from evaluation.commands.posthoc import parse_posthoc
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.symmetry.posthoc.compare_aggregators", parse_posthoc)
