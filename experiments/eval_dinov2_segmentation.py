"""Judge patch tokens by segmentation: OUTPUT --model NAME --weights FILE --tasks TASK ..."""

from evaluation.segmentation.arguments import parse_segmentation
from slurm.launch import launch

if __name__ == "__main__":
    launch("evaluation.judge.judge", parse_segmentation())
