"""Judge a frozen net by linear probe, kNN and more: OUTPUT --config-file FILE --weights FILE."""

from evaluation.commands.eval_dinov2_classification import parse_evaluation
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.judge.judge", parse_evaluation)
