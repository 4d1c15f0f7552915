"""Where a finished run leaves the weights of the network that it trained."""

EXPORTED = "exported/model.safetensors"  # in the run folder
FORMERLY = "exported/teacher.safetensors"  # in the folders of older runs
