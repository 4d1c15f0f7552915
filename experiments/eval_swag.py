"""Judge a SWAG ViT, reduced or not, on ImageNet: -m NAME [its flags] --weights FILE DIR.

Here -m is the published flag that names the model; a sweep is asked for by --multirun.
"""

import sys

from evaluation.commands.eval_swag import LISTS, parse_swag_evaluation, with_model_spelt_out
from slurm.command import main

if __name__ == "__main__":
    argv = with_model_spelt_out(sys.argv[1:])
    main("evaluation.classifier.judge_classifier", parse_swag_evaluation, argv, lists=LISTS)
