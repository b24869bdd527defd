"""A small world of facts, said in eight languages: inference examples and plain text, made without any file."""
