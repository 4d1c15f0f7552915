"""Judge a SWAG ViT, reduced or not, on ImageNet: -m NAME [its flags] --weights FILE DIR."""

from evaluation.swag_arguments import parse_swag_evaluation
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.classifier.judge_classifier", parse_swag_evaluation)
