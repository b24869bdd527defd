"""Training on `transformers.Trainer`, evaluation and export. Needs `pip install "ltp-sparse[train]"`."""
