"""Train with the installed wheel; run by CI in a folder without the checkout."""

import torch
from ultimate_hyperoptimizer import Auto, HyperOptimizer

torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
x, y = torch.randn(64, 8), torch.randn(64, 1)
for optimizer in (
    HyperOptimizer(model.parameters(), "Adam(0.001) / SGD(1e-5)", compile=False),
    Auto(model.parameters(), lr=1.0, compile=False),
):
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
print(f"trained with torch {torch.__version__}")
