"""The models compute what their docstrings say."""

import math

import pytest
import torch

from models import MODELS
from models.char_rnn import CharRNN
from models.mlp import MLP
from models.resnet import BasicBlock, ResNet


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


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)]
)
def test_resnets_have_the_parameters_of_he_et_al(depth, parameters):
    assert sum(p.numel() for p in ResNet(depth).parameters()) == parameters


def test_resnets_are_he_et_al_s_without_biases_and_with_parameter_free_shortcuts():
    model = MODELS["resnet20"].make()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 19
    for m in convolutions:
        assert m.bias is None and m.padding == (1, 1)
        sd = math.sqrt(2 / (m.out_channels * 9))  # He et al. 2015, fan-out
        assert m.weight.std().item() == pytest.approx(sd, rel=0.2)
    block = BasicBlock(4, 8).eval()
    torch.nn.init.zeros_(block.norm2.weight)  # what is left is the shortcut
    x, zeros = torch.rand(2, 4, 6, 6), torch.zeros(2, 2, 3, 3)
    expected = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("outputs", [2, 4])
def test_a_block_overwrites_no_needed_tensor(outputs):
    torch.manual_seed(0)
    block = BasicBlock(2, outputs).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    before, shortcut = x.clone(), x
    if outputs == 4:
        shortcut = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
    inner = block.norm2(block.conv2(block.norm1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (shortcut + inner).relu())
    assert torch.equal(x, before)
    assert torch.autograd.gradcheck(block, x.requires_grad_())


def test_resnet_gives_log_probabilities_and_refuses_other_depths():
    output = ResNet()(torch.randn(2, 3, 32, 32))
    assert output.shape == (2, 10)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(2))
    with pytest.raises(ValueError, match=r"layers .* not 21"):
        ResNet(21)


def test_char_rnn_carries_its_state_as_one_long_pass_would():
    torch.manual_seed(0)
    model, text = CharRNN(7, hidden=5), torch.randint(7, (3, 12))
    whole, _ = model(text)
    first, state = model(text[:, :5])
    second, _ = model(text[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(3, 12))


def test_char_rnn_starts_as_char_rnn_does():
    model = CharRNN(82)
    for layer in range(2):
        biases = dict(model.lstm.named_parameters())
        bias = biases[f"bias_ih_l{layer}"] + biases[f"bias_hh_l{layer}"]
        assert (bias[128:256] == 1).all() and (bias[:128].abs() <= 0.16).all()
    assert 0.07 < dict(model.lstm.named_parameters())["weight_hh_l0"].abs().max() <= 0.08


def test_the_transformer_reads_only_what_came_before():
    torch.manual_seed(0)
    model = MODELS["transformer"].make(82)
    assert sum(p.numel() for p in model.parameters()) == 788_736 + (82 + 256) * 128
    characters = torch.randint(82, (2, 9))
    changed = characters.clone()
    changed[:, 5:] = torch.randint(82, (2, 4))
    before, after = model(characters)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    torch.testing.assert_close(before.exp().sum(-1), torch.ones(2, 9))
    with pytest.raises(ValueError, match="reads 256 characters at a time, not 257"):
        model(torch.zeros(1, 257, dtype=torch.int64))
