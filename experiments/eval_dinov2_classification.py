"""Judge a frozen net by linear probe, kNN and more: OUTPUT --config-file FILE --weights FILE."""

from evaluation.arguments import parse_evaluation
from slurm.launch import launch

if __name__ == "__main__":
    launch("evaluation.judge.judge", parse_evaluation())
