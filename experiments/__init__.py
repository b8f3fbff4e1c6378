"""Data, the training run, the store of finished runs, and one module per table or figure."""
