"""The rules. Each is a class of hyperparameters, a state and one pure ``update``.

To add a rule, write one class here. Hypergradients, towers, notation, checkpoints and compiled
steps follow from its ``update``. No derivative is written by hand.

The arguments of ``update(w, g, s, h)`` are

* ``w`` and ``g``: the weights and their gradient, of one floating dtype. By default a rule is
  *elementwise*: both are 1-D, and ``update`` may receive any slice of the parameters, even an empty
  one. So it cannot use norms and means. (On an upper level, the "weights" are the raw
  hyperparameters of the level below.) A rule with ``elementwise = False``, in the second part of
  this file, receives each parameter in its own shape and can be the lowest level only.
* ``h.lr``, ``h.beta1``, ...: the values of the hyperparameters, float64 tensors that broadcast
  against ``w``. A 0-dim tensor does not change the dtype of ``w``. ``update`` is differentiated
  with respect to them.
* ``s["..."]``: the state that ``init`` or the last ``update`` returned, always with the same
  entries in the same order. Vectors have the shape of ``w``; a rule that is not elementwise may
  have others. 0-dim entries are float64.

``self.is_active("momentum")`` tells whether the update uses an optional hyperparameter. If it is 0
and not tuned, it costs nothing.

With its defaults, a rule computes the same as torch's optimizer of this name, if torch has it. The
options select variants, and set the constants in which the paper's own package
(``gradient-descent-the-ultimate-optimizer`` 1.0) differs. The domains of lr, of SGD's momentum and
of the betas are the paper's. The other domains keep a hyperparameter legal for every raw value.
Before you tune a hyperparameter that is 0 by default, give it a value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .domains import LOG, SQUARE, UNIT
from .rule import Rule, State, Values
from .tuning import Hyper, Option

# Helpers.


def root(v: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0.

    The second moment of a weight without gradients stays 0, and the derivative of the square root
    at 0 is infinite. No hyperparameter affects such a weight, so the right derivative is 0.
    """
    positive = v > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, v, 1.0)), 0.0)


def decay(w: Tensor, g: Tensor, h: Values, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Apply weight decay, decoupled or not. Returns the weights and the gradient."""
    if decoupled:  # Loshchilov and Hutter 2019
        return w - h.lr * h.weight_decay * w, g
    return w, g + h.weight_decay * w


def average(mean: Tensor, new: Tensor, beta: Tensor) -> Tensor:
    """beta * mean + (1 - beta) * new, with beta written once, so that its derivative is one sum."""
    return mean + (1 - beta) * (new - mean)


def counter() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


# The rules.


class SGD(Rule):
    """Stochastic gradient descent, as ``torch.optim.SGD``.

    Momentum is Polyak's (1964) or, with ``nesterov``, Nesterov's in the form of Sutskever et al.
    (2013).

    Raises:
        ValueError: ``nesterov`` without momentum.
    """

    lr = Hyper(1e-3)
    momentum = Hyper(0.0)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    nesterov = Option(False)

    def init(self, w: Tensor) -> State:
        if self.is_active("momentum"):
            return {"momentum_buffer": torch.zeros_like(w)}
        if self.nesterov:
            raise ValueError("SGD: nesterov=True needs a momentum, as in momentum=0.9")
        return {}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            g = g + h.weight_decay * w
        if not self.is_active("momentum"):
            return w - h.lr * g, {}
        buffer = h.momentum * s["momentum_buffer"] + g
        direction = g + h.momentum * buffer if self.nesterov else buffer
        return w - h.lr * direction, {"momentum_buffer": buffer}


class AdaGrad(Rule):
    """AdaGrad (Duchi et al. 2011), as ``torch.optim.Adagrad``.

    In the paper's code: ``initial_accumulator_value=0.1, eps_inside=True``.
    """

    lr = Hyper(1e-2)
    eps = Hyper(1e-10, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    lr_decay = Hyper(0.0, LOG, tuned=False)
    initial_accumulator_value = Option(0.0, low=0)
    eps_inside = Option(False)

    def init(self, w: Tensor) -> State:
        state = {"sum": torch.full_like(w, self.initial_accumulator_value)}
        return {**state, "step": counter()} if self.is_active("lr_decay") else state

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            g = g + h.weight_decay * w
        total = s["sum"] + g * g
        scale = root(total + h.eps) if self.eps_inside else root(total) + h.eps
        if not self.is_active("lr_decay"):
            return w - h.lr * g / scale, {"sum": total}
        lr = h.lr / (1 + s["step"] * h.lr_decay)
        return w - lr * g / scale, {"sum": total, "step": s["step"] + 1}


class RMSProp(Rule):
    """RMSProp (Tieleman and Hinton 2012), as ``torch.optim.RMSprop``, whose ``alpha`` is ``gamma``.

    With ``centered``, the variance replaces the second moment (Graves 2013). In the paper's code:
    ``eps_inside=True``.
    """

    lr = Hyper(1e-2, SQUARE)
    gamma = Hyper(0.99, UNIT, high=1.0)
    eps = Hyper(1e-8, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    momentum = Hyper(0.0, UNIT, high=1.0)
    centered = Option(False)
    eps_inside = Option(False)

    def init(self, w: Tensor) -> State:
        names = ["square_avg"]
        names += ["grad_avg"] if self.centered else []
        names += ["momentum_buffer"] if self.is_active("momentum") else []
        return {name: torch.zeros_like(w) for name in names}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            g = g + h.weight_decay * w
        square_avg = average(s["square_avg"], g * g, h.gamma)
        state, moment = {"square_avg": square_avg}, square_avg
        if self.centered:
            grad_avg = average(s["grad_avg"], g, h.gamma)
            state["grad_avg"], moment = grad_avg, square_avg - grad_avg * grad_avg
        scale = root(moment + h.eps) if self.eps_inside else root(moment) + h.eps
        if not self.is_active("momentum"):
            return w - h.lr * g / scale, state
        buffer = h.momentum * s["momentum_buffer"] + g / scale
        return w - h.lr * buffer, {**state, "momentum_buffer": buffer}


class Adadelta(Rule):
    """Adadelta (Zeiler 2012), as ``torch.optim.Adadelta``."""

    lr = Hyper(1.0)
    rho = Hyper(0.9, UNIT, high=1.0)
    eps = Hyper(1e-6, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)

    def init(self, w: Tensor) -> State:
        return {"square_avg": torch.zeros_like(w), "acc_delta": torch.zeros_like(w)}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            g = g + h.weight_decay * w
        square_avg = average(s["square_avg"], g * g, h.rho)
        delta = root((s["acc_delta"] + h.eps) / (square_avg + h.eps)) * g
        acc_delta = average(s["acc_delta"], delta * delta, h.rho)
        return w - h.lr * delta, {"square_avg": square_avg, "acc_delta": acc_delta}


class Adam(Rule):
    """Adam (Kingma and Ba 2015, Algorithm 1), as ``torch.optim.Adam``.

    With ``amsgrad``, the second moment never decreases (Reddi et al. 2018). In the paper's code
    it starts at eps: ``v0=1e-8``.
    """

    lr = Hyper(1e-3)
    beta1 = Hyper(0.9, UNIT, high=1.0)
    beta2 = Hyper(0.999, UNIT, high=1.0)
    eps = Hyper(1e-8, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    v0 = Option(0.0, low=0)
    amsgrad = Option(False)

    def init(self, w: Tensor) -> State:
        state = {
            "step": counter(),
            "exp_avg": torch.zeros_like(w),
            "exp_avg_sq": torch.full_like(w, self.v0),
        }
        return {**state, "max_exp_avg_sq": torch.zeros_like(w)} if self.amsgrad else state

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            g = g + h.weight_decay * w
        return self.adapt(w, g, s, h)

    def adapt(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        """The update without weight decay."""
        step = s["step"] + 1
        exp_avg = average(s["exp_avg"], g, h.beta1)
        exp_avg_sq = average(s["exp_avg_sq"], g * g, h.beta2)
        state, moment = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, exp_avg_sq
        if self.amsgrad:
            moment = state["max_exp_avg_sq"] = torch.maximum(s["max_exp_avg_sq"], exp_avg_sq)
        lr = h.lr / (1 - h.beta1**step)
        correction = torch.rsqrt(1 - h.beta2**step)
        # Multiply by a reciprocal: the derivative of a quotient needs two more divisions.
        scale = torch.reciprocal(root(moment) * correction + h.eps)
        return w - lr * exp_avg * scale, state


class Adamax(Rule):
    """Adamax (Kingma and Ba 2015, Algorithm 2), as ``torch.optim.Adamax``."""

    lr = Hyper(2e-3)
    beta1 = Hyper(0.9, UNIT, high=1.0)
    beta2 = Hyper(0.999, UNIT, high=1.0)
    eps = Hyper(1e-8, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)

    def init(self, w: Tensor) -> State:
        return {"step": counter(), "exp_avg": torch.zeros_like(w), "exp_inf": torch.zeros_like(w)}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            g = g + h.weight_decay * w
        step = s["step"] + 1
        exp_avg = average(s["exp_avg"], g, h.beta1)
        exp_inf = torch.maximum(h.beta2 * s["exp_inf"], g.abs() + h.eps)
        lr = h.lr / (1 - h.beta1**step)
        w = w - lr * exp_avg * torch.reciprocal(exp_inf)
        return w, {"step": step, "exp_avg": exp_avg, "exp_inf": exp_inf}


class NAdam(Rule):
    """Adam with Nesterov momentum (Dozat 2016), as ``torch.optim.NAdam``."""

    lr = Hyper(2e-3)
    beta1 = Hyper(0.9, UNIT, high=1.0)
    beta2 = Hyper(0.999, UNIT, high=1.0)
    eps = Hyper(1e-8, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    momentum_decay = Hyper(4e-3, LOG, tuned=False)
    decoupled_weight_decay = Option(False)

    def init(self, w: Tensor) -> State:
        # If beta1 or momentum_decay is a vector, so is their product.
        several = any(isinstance(self.values[n], dict) for n in ("beta1", "momentum_decay"))
        return {
            "step": counter(),
            "mu_product": torch.ones_like(w) if several else torch.ones_like(counter()),
            "exp_avg": torch.zeros_like(w),
            "exp_avg_sq": torch.zeros_like(w),
        }

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            w, g = decay(w, g, h, self.decoupled_weight_decay)
        step = s["step"] + 1
        mu = h.beta1 * (1 - 0.5 * 0.96 ** (step * h.momentum_decay))
        mu_next = h.beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * h.momentum_decay))
        mu_product = s["mu_product"] * mu
        exp_avg = average(s["exp_avg"], g, h.beta1)
        exp_avg_sq = average(s["exp_avg_sq"], g * g, h.beta2)
        of_g = h.lr * (1 - mu) / (1 - mu_product)
        of_avg = h.lr * mu_next / (1 - mu_product * mu_next)
        correction = torch.rsqrt(1 - h.beta2**step)
        scale = torch.reciprocal(root(exp_avg_sq) * correction + h.eps)
        return w - (of_g * g + of_avg * exp_avg) * scale, {
            "step": step,
            "mu_product": mu_product,
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
        }


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as ``torch.optim.AdamW``."""

    weight_decay = Hyper(1e-2, LOG, tuned=False)

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            w = w - h.lr * h.weight_decay * w
        return self.adapt(w, g, s, h)


class RAdam(Rule):
    """Rectified Adam (Liu et al. 2020, Algorithm 2), as ``torch.optim.RAdam``."""

    lr = Hyper(1e-3)
    beta1 = Hyper(0.9, UNIT, high=1.0)
    beta2 = Hyper(0.999, UNIT, high=1.0)
    eps = Hyper(1e-8, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    decoupled_weight_decay = Option(False)

    def init(self, w: Tensor) -> State:
        return {
            "step": counter(),
            "exp_avg": torch.zeros_like(w),
            "exp_avg_sq": torch.zeros_like(w),
        }

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            w, g = decay(w, g, h, self.decoupled_weight_decay)
        step = s["step"] + 1
        exp_avg = average(s["exp_avg"], g, h.beta1)
        exp_avg_sq = average(s["exp_avg_sq"], g * g, h.beta2)
        power = h.beta2**step
        limit = 2 / (1 - h.beta2) - 1
        length = limit - 2 * step * power / (1 - power)
        rectified = length > 5
        # The unused branch of `where` must have finite derivatives, too.
        limit, length = (torch.where(rectified, x, 6.0) for x in (limit, length))
        ratio = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        adapted = torch.sqrt(ratio * (1 - power)) * torch.reciprocal(root(exp_avg_sq) + h.eps)
        lr = h.lr / (1 - h.beta1**step)
        w = w - lr * exp_avg * torch.where(rectified, adapted, 1.0)
        return w, {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


class Lion(Rule):
    """Lion (Chen et al. 2023, Algorithm 2), with decoupled weight decay.

    The hypergradients of both betas are 0. beta1 enters the update through a sign, whose derivative
    is 0. beta2 affects the weights only from the next step on. So they are not tuned by default.
    """

    lr = Hyper(1e-4)
    beta1 = Hyper(0.9, UNIT, tuned=False, high=1.0)
    beta2 = Hyper(0.99, UNIT, tuned=False, high=1.0)
    weight_decay = Hyper(0.0, LOG, tuned=False)

    def init(self, w: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(w)}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        direction = torch.sign(average(s["exp_avg"], g, h.beta1))
        if self.is_active("weight_decay"):
            direction = direction + h.weight_decay * w
        exp_avg = average(s["exp_avg"], g, h.beta2)
        return w - h.lr * direction, {"exp_avg": exp_avg}


class ScheduleFreeAdam(Rule):
    """Schedule-Free Adam (Defazio et al. 2024, arXiv 2405.15682, Algorithm 1).

    It equals ``AdamWScheduleFree`` of the authors' package ``schedulefree``, with
    ``weight_lr_power=0``.

    Gradients are taken at the weights y = (1 - beta1) z + beta1 x. z makes Adam's steps without
    momentum. x is the weighted mean of all z, with weight t^r for the z of step t. The state has
    ``ahead`` = z - y, so that x = y - (1 / beta1 - 1) * ahead.
    """

    lr = Hyper(2.5e-3)
    beta1 = Hyper(0.9, UNIT, high=1.0)
    beta2 = Hyper(0.999, UNIT, high=1.0)
    eps = Hyper(1e-8, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    r = Option(0.0, low=0)

    def init(self, w: Tensor) -> State:
        return {
            "step": counter(),
            "weight_sum": counter(),
            "ahead": torch.zeros_like(w),
            "exp_avg_sq": torch.zeros_like(w),
        }

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        step = s["step"] + 1
        weight = step**self.r
        weight_sum = s["weight_sum"] + weight
        new = weight / weight_sum  # the weight of the new z in the mean
        exp_avg_sq = average(s["exp_avg_sq"], g * g, h.beta2)
        correction = torch.rsqrt(1 - h.beta2**step)
        direction = g * torch.reciprocal(root(exp_avg_sq) * correction + h.eps)
        if self.is_active("weight_decay"):
            direction = direction + h.weight_decay * w
        move = h.lr * direction
        kept = h.beta1 * (1 - new)
        return w + new * s["ahead"] - (1 - kept) * move, {
            "step": step,
            "weight_sum": weight_sum,
            "ahead": (1 - new) * s["ahead"] - kept * move,
            "exp_avg_sq": exp_avg_sq,
        }


class Rprop(Rule):
    """Resilient backpropagation (Riedmiller and Braun 1993), as ``torch.optim.Rprop``.

    It uses only the sign of the gradient. Each weight has its own step size, which starts at lr.
    The state has step sizes divided by lr, so that the level above moves all of them with lr.
    """

    linear_in_lr = False

    lr = Hyper(1e-2)
    # A weight does not move after a change of the gradient's sign, so the hypergradient is 0.
    eta_minus = Hyper(0.5, UNIT, tuned=False, high=1.0)
    eta_plus = Hyper(1.2, LOG)
    step_size_min = Option(1e-6, low=0)
    step_size_max = Option(50.0, low=0)

    def init(self, w: Tensor) -> State:
        return {"prev": torch.zeros_like(w), "step_size": torch.ones_like(w)}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        sign, moves = g * s["prev"], h.lr > 0
        factor = torch.where(sign > 0, h.eta_plus, torch.where(sign < 0, h.eta_minus, 1.0))
        lr = torch.where(moves, h.lr, 1.0)
        step = (lr * s["step_size"] * factor.to(w)).clamp(self.step_size_min, self.step_size_max)
        g = torch.where(sign < 0, 0.0, g)
        return w - torch.where(moves, step, 0.0) * torch.sign(g), {
            "prev": g,
            "step_size": torch.where(moves, step / lr, s["step_size"]),
        }


class ASGD(Rule):
    """Averaged SGD (Polyak and Juditsky 1992), as ``torch.optim.ASGD``.

    The state has ``ax``, the mean of the weights from the ``t0``-th step on. Use it instead of the
    weights when training ends.
    """

    linear_in_lr = False

    lr = Hyper(1e-2)
    lambd = Hyper(1e-4, LOG, tuned=False)
    alpha = Hyper(0.75, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    t0 = Option(1e6, low=0)

    def init(self, w: Tensor) -> State:
        return {"step": counter(), "ax": torch.zeros_like(w)}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        if self.is_active("weight_decay"):
            g = g + h.weight_decay * w
        step = s["step"]
        lr = h.lr / (1 + h.lambd * h.lr * step) ** h.alpha
        w = w * (1 - h.lambd * lr) - lr * g
        new = 1 / (step - self.t0).clamp(min=1)
        return w, {"step": step + 1, "ax": s["ax"] + new * (w - s["ax"])}


# Rules that are not elementwise: `update` gets each parameter in its own shape.


class Muon(Rule):
    """Orthogonalized momentum (Jordan et al. 2024), as ``torch.optim.Muon``. For matrices only.

    Five Newton-Schulz iterations move the singular values of the momentum to about 1. They run in
    bfloat16, as in torch. With ``bfloat16=False`` they run in the precision of the weights.
    ``adjust_lr_fn`` selects how lr depends on the shape of a matrix.
    """

    elementwise, ndim = False, 2
    compiles = False  # matrix products take nearly all of the time (measured)

    lr = Hyper(1e-3)
    weight_decay = Hyper(0.1, LOG, tuned=False)
    momentum = Hyper(0.95, UNIT, high=1.0)
    nesterov = Option(True)
    ns_coefficients = Option((3.4445, -4.7750, 2.0315))
    eps = Option(1e-7, low=0)
    ns_steps = Option(5, low=0)
    adjust_lr_fn = Option("original", choices=("original", "match_rms_adamw", "spectral_unclamped"))
    bfloat16 = Option(True)

    def init(self, w: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(w)}

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        buffer = average(s["momentum_buffer"], g, h.momentum)
        direction = average(buffer, g, h.momentum) if self.nesterov else buffer
        if self.bfloat16:
            direction = direction.bfloat16()
        direction = orthogonalized(direction, self.ns_coefficients, self.ns_steps, self.eps).to(w)
        rows, columns = w.shape
        ratio = {
            "original": max(1, rows / columns) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
            "spectral_unclamped": (rows / columns) ** 0.5,
        }
        if self.is_active("weight_decay"):
            w = w * (1 - h.lr * h.weight_decay)
        return w - h.lr * ratio[self.adjust_lr_fn] * direction, {"momentum_buffer": buffer}


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Move the singular values of a matrix, [m, n], to about 1 by Newton-Schulz iterations."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Adafactor(Rule):
    """Adafactor (Shazeer and Stern 2018), as ``torch.optim.Adafactor``.

    The second moments of a matrix are the product of a column and a row, so that the state is
    small. A tensor with more dimensions has such a pair for each of its matrices. For a vector the
    state has all second moments.
    """

    elementwise = False
    linear_in_lr = False

    lr = Hyper(1e-2)
    beta2_decay = Hyper(-0.8, tuned=False, low=-math.inf, high=math.ulp(0.0))
    eps2 = Hyper(1e-3, LOG, tuned=False)
    d = Hyper(1.0, LOG, tuned=False)
    weight_decay = Hyper(0.0, LOG, tuned=False)
    eps1 = Option(0.0, low=0)  # 0: the unit in the last place of the weights' dtype

    def init(self, w: Tensor) -> State:
        nothing = w.new_zeros(0)
        if w.ndim == 1:
            return {
                "step": counter(),
                "row_var": nothing,
                "col_var": nothing,
                "variance": torch.zeros_like(w),
            }
        return {
            "step": counter(),
            "row_var": torch.zeros_like(w[..., :1]),
            "col_var": torch.zeros_like(w[..., :1, :]),
            "variance": nothing,
        }

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        eps1 = self.eps1 or torch.finfo(w.dtype).eps
        step = s["step"] + 1
        new = step**h.beta2_decay
        lr = torch.minimum(h.lr, step**-0.5) * torch.maximum(h.eps2, rms(w).to(h.eps2))
        square = g * g
        if w.ndim == 1:
            variance = s["variance"] + new * (square - s["variance"])
            after = {**s, "step": step, "variance": variance}
        else:
            row = s["row_var"] + new * (square.mean(-1, keepdim=True) - s["row_var"])
            column = s["col_var"] + new * (square.mean(-2, keepdim=True) - s["col_var"])
            variance = row * column / row.mean(-2, keepdim=True).clamp(min=eps1)
            after = {**s, "step": step, "row_var": row, "col_var": column}
        direction = g * torch.rsqrt(variance.clamp(min=eps1 * eps1))
        too_long = torch.maximum(torch.ones_like(h.d), rms(direction).to(h.d) / h.d)
        if self.is_active("weight_decay"):
            w = w * (1 - h.lr * h.weight_decay)
        return w - lr / too_long * direction, after


def rms(x: Tensor) -> Tensor:
    """The root mean square, 0-dim, with derivative 0 at 0."""
    return root((x * x).sum() / x.numel())


class SOAP(Rule):
    """Adam in the eigenbases of Shampoo's factors. For matrices only.

    It is Algorithm 3 of Vyas et al. 2024 (arXiv 2409.11321), with Adam's bias correction. The
    factors, ``left`` and ``right``, are moving averages of g gᵀ and gᵀ g. The moments are kept in
    their eigenbases. ``eigh`` finds the first bases. After every ``precondition_frequency``
    updates, one power iteration and a QR decomposition refresh them.

    As in the authors' code, the first gradient makes the factors and their bases, and moves no
    weight. An update uses bases of earlier gradients only, so that they are constants in its
    hypergradients.
    """

    elementwise, ndim = False, 2
    compiles = False  # it branches on the number of the step, and matrix products take the time

    lr = Hyper(3e-3)
    beta1 = Hyper(0.95, UNIT, high=1.0)
    beta2 = Hyper(0.95, UNIT, high=1.0)
    eps = Hyper(1e-8, LOG, tuned=False)
    weight_decay = Hyper(1e-2, LOG, tuned=False)
    precondition_frequency = Option(10, low=1)

    def init(self, w: Tensor) -> State:
        rows, columns = w.shape
        return {
            "step": counter(),
            "exp_avg": torch.zeros_like(w),
            "exp_avg_sq": torch.zeros_like(w),
            "left": w.new_zeros(rows, rows),
            "right": w.new_zeros(columns, columns),
            "left_basis": w.new_zeros(rows, rows),
            "right_basis": w.new_zeros(columns, columns),
        }

    def update(self, w: Tensor, g: Tensor, s: State, h: Values) -> tuple[Tensor, State]:
        step, beta2 = s["step"], h.beta2.detach()
        left, right = average(s["left"], g @ g.T, beta2), average(s["right"], g.T @ g, beta2)
        state = {**s, "step": step + 1, "left": left, "right": right}
        if step == 0:
            bases = {"left_basis": eigenbasis(left), "right_basis": eigenbasis(right)}
            return w, {**state, **bases}
        q_left, q_right = s["left_basis"], s["right_basis"]
        rotated = q_left.T @ g @ q_right
        exp_avg = average(s["exp_avg"], rotated, h.beta1)
        exp_avg_sq = average(s["exp_avg_sq"], rotated * rotated, h.beta2)
        lr = h.lr / (1 - h.beta1**step)
        correction = torch.rsqrt(1 - h.beta2**step)
        direction = exp_avg * torch.reciprocal(root(exp_avg_sq) * correction + h.eps)
        w = w - lr * (q_left @ direction @ q_right.T)
        if self.is_active("weight_decay"):
            w = w * (1 - h.lr * h.weight_decay)
        if step % self.precondition_frequency == 0:
            in_rows, q_left_new = refreshed(left, q_left)
            in_columns, q_right_new = refreshed(right, q_right)
            # Without a tangent: the derivative of a state is never used.
            exp_avg = q_left_new.T @ (q_left @ exp_avg.detach() @ q_right.T) @ q_right_new
            exp_avg_sq = exp_avg_sq[in_rows][:, in_columns]
            state |= {"left_basis": q_left_new, "right_basis": q_right_new}
        return w, {**state, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def eigenbasis(factor: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix, [n, n], in columns from the largest eigenvalue."""
    finite = torch.where(factor.isfinite(), factor, 0.0)  # eigh raises an error at NaN
    return torch.linalg.eigh(finite).eigenvectors.flip(1)


def refreshed(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The order of a basis by eigenvalue, and the basis after one power iteration (Algorithm 4)."""
    power = factor @ basis
    order = (basis * power).sum(0).argsort(descending=True)
    return order, torch.linalg.qr(power[:, order]).Q
