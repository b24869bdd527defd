"""Which entries of a model are active, and what has changed on them."""
