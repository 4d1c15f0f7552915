"""Judge patch tokens by segmentation: OUTPUT --model NAME --weights FILE --tasks TASK ..."""

from evaluation.commands.eval_dinov2_segmentation import parse_segmentation
from slurm.command import main

if __name__ == "__main__":
    main("evaluation.judge.judge", parse_segmentation)
