"""A slow stack that follows the definition literally: the reference for `hyperopt`.

The rules are written for one weight at a time, as in the papers they come from. The hypergradient
of a raw hyperparameter is taken literally: make the last step again with another value of it, all
levels below included, and see how the loss changes. All derivatives, the model's too, are central
differences; in 60 digits they are good for more than float64 can tell. Nothing is shared with
`hyperopt` but the notation.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace

import mpmath

from hyperopt import parse

mp = mpmath.MPContext()
mp.dps = 60
DELTA = mp.mpf("1e-18")


def sgd(w, g, s, h):
    g = g + h.weight_decay * w
    buffer = h.momentum * s.get("buffer", 0) + g
    return w - h.lr * (g + h.momentum * buffer if h.nesterov else buffer), {"buffer": buffer}


def adagrad(w, g, s, h):
    g = g + h.weight_decay * w
    t = s.get("t", 0) + 1
    total = s.get("sum", h.initial_accumulator_value) + g**2
    scale = mp.sqrt(total + h.eps) if h.eps_inside else mp.sqrt(total) + h.eps
    return w - h.lr / (1 + (t - 1) * h.lr_decay) * g / scale, {"t": t, "sum": total}


def rmsprop(w, g, s, h):
    g = g + h.weight_decay * w
    mean = h.gamma * s.get("mean", 0) + (1 - h.gamma) * g**2
    first = h.gamma * s.get("first", 0) + (1 - h.gamma) * g
    moment = mean - first**2 if h.centered else mean
    scale = mp.sqrt(moment + h.eps) if h.eps_inside else mp.sqrt(moment) + h.eps
    buffer = h.momentum * s.get("buffer", 0) + g / scale
    return w - h.lr * buffer, {"mean": mean, "first": first, "buffer": buffer}


def adadelta(w, g, s, h):
    g = g + h.weight_decay * w
    mean = h.rho * s.get("mean", 0) + (1 - h.rho) * g**2
    delta = mp.sqrt(s.get("moves", 0) + h.eps) / mp.sqrt(mean + h.eps) * g
    moves = h.rho * s.get("moves", 0) + (1 - h.rho) * delta**2
    return w - h.lr * delta, {"mean": mean, "moves": moves}


def adam(w, g, s, h):
    return adapt(w, g + h.weight_decay * w, s, h)


def adamw(w, g, s, h):
    return adapt(w - h.lr * h.weight_decay * w, g, s, h)


def adapt(w, g, s, h):
    t = s.get("t", 0) + 1
    m = h.beta1 * s.get("m", 0) + (1 - h.beta1) * g
    v = h.beta2 * s.get("v", h.v0) + (1 - h.beta2) * g**2
    largest = max(v, s.get("largest", 0)) if h.amsgrad else v
    m_hat, v_hat = m / (1 - h.beta1**t), largest / (1 - h.beta2**t)
    after = {"t": t, "m": m, "v": v, "largest": largest}
    return w - h.lr * m_hat / (mp.sqrt(v_hat) + h.eps), after


def adamax(w, g, s, h):
    g = g + h.weight_decay * w
    t = s.get("t", 0) + 1
    m = h.beta1 * s.get("m", 0) + (1 - h.beta1) * g
    u = max(h.beta2 * s.get("u", 0), abs(g) + h.eps)
    return w - h.lr / (1 - h.beta1**t) * m / u, {"t": t, "m": m, "u": u}


def nadam(w, g, s, h):
    w, g = decay(w, g, h)
    t = s.get("t", 0) + 1
    mu, next_mu = (h.beta1 * (1 - mp.mpf("0.96") ** (i * h.momentum_decay) / 2) for i in (t, t + 1))
    product = s.get("product", 1) * mu
    m = h.beta1 * s.get("m", 0) + (1 - h.beta1) * g
    v = h.beta2 * s.get("v", 0) + (1 - h.beta2) * g**2
    m_hat = next_mu * m / (1 - product * next_mu) + (1 - mu) * g / (1 - product)
    v_hat = v / (1 - h.beta2**t)
    after = {"t": t, "product": product, "m": m, "v": v}
    return w - h.lr * m_hat / (mp.sqrt(v_hat) + h.eps), after


def radam(w, g, s, h):
    w, g = decay(w, g, h)
    t = s.get("t", 0) + 1
    m = h.beta1 * s.get("m", 0) + (1 - h.beta1) * g
    v = h.beta2 * s.get("v", 0) + (1 - h.beta2) * g**2
    m_hat, after = m / (1 - h.beta1**t), {"t": t, "m": m, "v": v}
    limit = 2 / (1 - h.beta2) - 1
    rho = limit - 2 * t * h.beta2**t / (1 - h.beta2**t)
    if rho <= 5:
        return w - h.lr * m_hat, after
    r = mp.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    scale = mp.sqrt(1 - h.beta2**t) / (mp.sqrt(v) + h.eps)
    return w - h.lr * r * m_hat * scale, after


def decay(w, g, h):
    if h.decoupled_weight_decay:
        return w - h.lr * h.weight_decay * w, g
    return w, g + h.weight_decay * w


def lion(w, g, s, h):
    c = h.beta1 * s.get("m", 0) + (1 - h.beta1) * g
    m = h.beta2 * s.get("m", 0) + (1 - h.beta2) * g
    return w - h.lr * (mp.sign(c) + h.weight_decay * w), {"m": m}


def schedule_free(w, g, s, h):
    t = s.get("t", 0) + 1
    v = h.beta2 * s.get("v", 0) + (1 - h.beta2) * g**2
    total = s.get("total", 0) + mp.mpf(t) ** h.r
    c = mp.mpf(t) ** h.r / total
    z = s.get("z", w)
    x = (w - (1 - h.beta1) * z) / h.beta1
    d = g / (mp.sqrt(v / (1 - h.beta2**t)) + h.eps) + h.weight_decay * w
    z = z - h.lr * d
    x = (1 - c) * x + c * z
    return (1 - h.beta1) * z + h.beta1 * x, {"t": t, "v": v, "total": total, "z": z}


def rprop(w, g, s, h):
    sign = mp.sign(g * s.get("g", 0))
    scale = {1: h.eta_plus, -1: h.eta_minus, 0: 1}[int(sign)]
    # The step size is a multiple of lr, whose limits are not.
    step = min(max(h.lr * s.get("step", 1) * scale, h.step_size_min), h.step_size_max)
    g = 0 if sign < 0 else g
    return w - step * mp.sign(g), {"g": g, "step": step / h.lr}


def asgd(w, g, s, h):
    t = s.get("t", 0)
    lr = h.lr / (1 + h.lambd * h.lr * t) ** h.alpha
    return w - lr * (h.lambd * w + g + h.weight_decay * w), {"t": t + 1}


UPDATES = {
    "SGD": sgd,
    "AdaGrad": adagrad,
    "RMSProp": rmsprop,
    "Adadelta": adadelta,
    "Adam": adam,
    "Adamax": adamax,
    "NAdam": nadam,
    "AdamW": adamw,
    "RAdam": radam,
    "Lion": lion,
    "ScheduleFreeAdam": schedule_free,
    "Rprop": rprop,
    "ASGD": asgd,
}
TO_RAW = {
    "real": lambda h: h,
    "unit": lambda h: mp.atanh(2 * h - 1),
    "square": mp.sqrt,
    "log": mp.log,
}
FROM_RAW = {
    "real": lambda r: r,
    "unit": lambda r: (mp.tanh(r) + 1) / 2,
    "square": lambda r: r**2,
    "log": mp.exp,
}


def derivative(f: Callable, x):
    return (f(x + DELTA) - f(x - DELTA)) / (2 * DELTA)


class Reference:
    """A stack that moves a handful of weights.

    Args:
        stack: its notation.
        w: the initial weights.
        groups: the number of each weight's param group.
        overrides: for each param group, the hyperparameters that it has to itself.

    Attributes:
        raw: per level, the raw values by name; ``"lr[1]"`` is that of group 1 alone.
        hypergradients: per level, the derivative of the loss by each of them, at the last step.
    """

    def __init__(self, stack: str, w: Iterable[float], groups=(), overrides=({},)) -> None:
        self.levels = parse(stack).levels
        self.w = {i: mp.mpf(x) for i, x in enumerate(w)}
        self.groups = groups or [0] * len(self.w)
        self.raw: list[dict] = []
        self.constants: list[dict] = []
        for k, rule in enumerate(self.levels):
            values = {
                f"{name}[{owner}]" if owner else name: x
                for name, value in rule.values.items()
                for owner, x in (value if isinstance(value, dict) else {"": value}).items()
            }
            if k == 0:
                values |= {f"{n}[{g}]": x for g, o in enumerate(overrides) for n, x in o.items()}
            tuned = rule.tuned if k + 1 < len(self.levels) else {}
            raw, constants = {}, {}
            for key, value in values.items():
                if base(key) in tuned:
                    raw[key] = TO_RAW[tuned[base(key)].domain.name](mp.mpf(value))
                else:
                    constants[key] = mp.mpf(value)
            self.raw.append(raw)
            self.constants.append(constants)
        self.states: list[dict] = [{} for _ in self.levels]
        self.last: list[tuple] = []  # per level, what its last move read
        self.hypergradients: list[dict] = []

    def values(self, k: int, raw: dict) -> dict:
        """The values that level k's rule uses, by name, where its raw values are ``raw``."""
        tuned = self.levels[k].tuned
        values = {key: FROM_RAW[tuned[base(key)].domain.name](r) for key, r in raw.items()}
        return {**values, **self.constants[k]}

    def hyperparameters(self) -> list[dict[str, float]]:
        return [
            {key: float(x) for key, x in self.values(k, raw).items()}
            for k, raw in enumerate(self.raw)
        ]

    def move(self, k: int, raw: dict, w: dict, g: dict, states: dict) -> tuple[dict, dict]:
        """What level k makes of those ``w`` that have a ``g``, and the states that remain."""
        rule, values = self.levels[k], self.values(k, raw)
        moved, after = dict(w), dict(states)
        for key in g:
            owner = base(key) if k else self.groups[key]
            h = {name: values.get(f"{name}[{owner}]", values.get(name)) for name in rule.hypers}
            h |= rule.settings
            update = UPDATES[rule.name]
            moved[key], after[key] = update(
                w[key], g[key], states.get(key, {}), SimpleNamespace(**h)
            )
        return moved, after

    def step(self, loss: Callable, active: Iterable[int] | None = None) -> None:
        """One step.

        Args:
            loss: a function of the weights, by number.
            active: those that have a gradient; the others are left alone.
        """
        active = list(self.w if active is None else active)
        if not active:
            self.last = []
            return

        def again(k: int, key: str, r) -> float:
            """The loss, had level k's raw value ``key`` been r at the last step."""
            raw = {**self.raw[k], key: r}
            for j in reversed(range(k + 1)):
                raw, _ = self.move(j, raw, *self.last[j])
            return loss({**self.w, **{i: raw[i] for i in self.last[0][1]}})

        g = {i: derivative(lambda x, i=i: loss({**self.w, i: x}), self.w[i]) for i in active}
        self.hypergradients = [
            {
                key: derivative(lambda r, k=k, key=key: again(k, key, r), r)
                if self.last
                else mp.mpf(0)
                for key, r in raw.items()
            }
            for k, raw in enumerate(self.raw[:-1])
        ]
        self.last = [(self.w, g, self.states[0])]
        for k, hypergradient in enumerate(self.hypergradients, start=1):
            self.last.append((self.raw[k - 1], hypergradient, self.states[k]))
        for k in reversed(range(1, len(self.levels))):
            self.raw[k - 1], self.states[k] = self.move(k, self.raw[k], *self.last[k])
        self.w, self.states[0] = self.move(0, self.raw[0], *self.last[0])


def base(key: str) -> str:
    return key.partition("[")[0]
