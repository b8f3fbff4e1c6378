"""What makes `hyperopt.algorithm` fast, and lets it live in a `torch.optim.Optimizer`. Private."""
