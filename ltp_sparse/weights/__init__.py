"""Names, tensors and files: the content of models and checkpoints, read and written."""
