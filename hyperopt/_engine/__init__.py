"""Private: a fast `hyperopt.algorithm`, as the engine of a `torch.optim.Optimizer`."""
