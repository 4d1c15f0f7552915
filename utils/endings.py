"""How runs end but by their last step or an error, told to those too who read run folders."""

HUNG = 75  # exit code of a rank that ended itself; a restart goes on from the last checkpoint
LOST = 76  # exit code of a process whose lock was taken over
MAX_STEPS = "training.max_steps"  # what stopped a run that was asked for no more steps
