"""Names, tensors and files: what models and checkpoints hold, and how they are read and written."""
