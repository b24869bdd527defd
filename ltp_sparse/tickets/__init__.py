"""Which entries of a model are active."""
