"""Judge a frozen net by kNN: OUTPUT --config-file FILE --pretrained-weights FILE."""

from evaluation.arguments import parse_evaluation
from slurm.launch import launch

if __name__ == "__main__":
    launch("evaluation.judge.judge", parse_evaluation())
