"""The models compute what their docstrings say."""

import torch

from models.mlp import MLP


def test_mlp_is_tanh_after_both_layers_then_log_softmax() -> None:
    model = MLP()
    images = torch.rand(5, 28, 28)
    w1, b1, w2, b2 = (p.detach().double() for p in model.parameters())
    hidden = torch.tanh(images.double().reshape(5, 784) @ w1.T + b1)
    logits = torch.tanh(hidden @ w2.T + b2)
    expected = logits - logits.exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(model(images).double(), expected, atol=1e-6, rtol=0)


def test_mlp_has_the_papers_size() -> None:
    assert [tuple(p.shape) for p in MLP().parameters()] == [(128, 784), (128,), (10, 128), (10,)]
    assert sum(p.numel() for p in MLP().parameters()) == 101_770
