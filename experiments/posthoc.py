"""Make a trained classifier invariant by each aggregator: --model NAME --model_path FILE."""

from evaluation.posthoc_arguments import parse_posthoc
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.posthoc.compare_aggregators", parse_posthoc)
