"""Judge a classifier as DeiT does: --model NAME --eval FILE [--data-path DIR]."""

from evaluation.commands.eval_deit import LISTS, parse_deit_evaluation
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.classifier.judge_classifier", parse_deit_evaluation, lists=LISTS)
