"""Notation: any stack can be written and parsed; anything else gets a one-line error."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import hyperopt
from hyperopt import DOMAINS, RULES, SGD, AdaGrad, Adam, AdamW, RMSProp, Rule, Stack, parse
from hyperopt.domains import LOG


@st.composite
def rules(draw, below: Rule | None, second: bool = False) -> Rule:
    """Any rule; above another, perhaps with a value for each hyperparameter that it moves."""
    # Above the lowest level, only rules that need no shapes.
    cls = RULES[
        draw(st.sampled_from([n for n in sorted(RULES) if not below or RULES[n].elementwise]))
    ]
    subset = None
    # A value below 0, as Adafactor's beta2_decay, is at home in the real domain alone.
    positive = sorted(name for name, hyper in cls.hypers.items() if hyper.high > 1e-300)
    if draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(positive), unique=True))
        subset = {name: draw(st.sampled_from([None, *sorted(DOMAINS)])) for name in names}

    def number(name: str, zero: bool = False) -> float:
        # In the open unit interval every domain is at home.
        high = 1.0 if math.isfinite(cls.hypers[name].high) or subset is not None else 1e300
        numbers = st.floats(1e-300, high, exclude_max=True)
        return draw(st.just(0.0) | numbers if zero else numbers)

    def value(name: str):
        # One number of 0 may stand for a hyperparameter that takes no part; several take part.
        zero = cls.hypers[name].default == 0 and name not in (subset or ())
        if below is not None and draw(st.integers(0, 3)) == 0:
            zero = zero and 0 in cls.hypers[name].domain
            return {target: number(name, zero) for target in below.tuned}
        return number(name, zero)

    given_names = draw(st.lists(st.sampled_from(positive), unique=True))
    arguments = {name: value(name) for name in given_names}
    if subset is not None:
        # A tuned value must lie in its domain; only the real domain has 0.
        arguments |= {name: number(name) for name in subset if name not in arguments}
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(1, 10**9),
        float: st.floats(0, 1e300),
    }
    kinds[tuple] = st.tuples(*[st.floats(-10, 10)] * 3)  # ns_coefficients
    moved = {} if below is None else below.tuned
    barred = set(vars(Rule)) if below is None else {"horizon", "trust"} if not second else set()
    if "lr" not in moved or moved["lr"].domain is not LOG:
        barred.add("trust")
    if "trust" not in barred and draw(st.booleans()):
        arguments["trust"] = draw(st.floats(1e-300, 1e300))
    for name, option in cls.options.items():
        if name not in barred and draw(st.booleans()):
            words = option.choices
            own = st.sampled_from(words) if words else kinds[type(option.default)]
            arguments[name] = draw(own)
    if "horizon" in arguments:
        arguments["horizon"] += 1
    rule = cls(**arguments)
    if subset is None:
        return rule
    return rule[tuple(f"{name}: {d}" if d else name for name, d in subset.items())]


@st.composite
def stacks(draw) -> Stack:
    levels = [draw(rules(None))]
    for _ in range(draw(st.integers(0, 3))):
        if not levels[-1].tuned:
            break
        levels.append(draw(rules(levels[-1], len(levels) == 1)))
    return Stack(*levels)


@given(stacks())
def test_any_stack_round_trips(stack):
    assert parse(str(stack)) == stack
    assert str(parse(str(stack))) == str(stack)
    assert parse(str(stack).replace(" ", "")) == stack
    assert hash(parse(str(stack))) == hash(stack)


ALPHABET = [
    *RULES,
    *"/()[]{},:=",
    " ",
    "lr",
    "beta1",
    "0.1",
    "1e-5",
    "-1",
    "inf",
    "nan",
    "True",
    "é",
    "\n",
]


@given(st.text() | st.lists(st.sampled_from(ALPHABET)).map("".join))
@example("Adam(0.001) / SGD(1e-5)")
@example("Adam(" * 2000)
@example("SGD(1e999)")
@example("SGD(\u0663)")
@example("Adam(0.001\n, beta1=2)")
def test_anything_else_is_refused_in_one_line(text):
    try:
        stack = parse(text)
    except ValueError as error:
        assert str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert parse(str(stack)) == stack


def test_python_and_notation_say_the_same():
    assert parse("Adam(0.001) / SGD(1e-5)") == Adam(0.001) / SGD(1e-5)
    assert parse("Adam / SGD") == Adam() / SGD()
    assert parse("Adam(0.001)[lr] / SGD(1e-5)") == Adam(0.001)["lr"] / SGD(1e-5)
    assert parse("RMSProp(0.01)[lr: log, gamma]") == Stack(RMSProp(0.01)["lr: log", "gamma"])
    assert parse("Adam(0.0040, 0.899, 0.999)") == Stack(Adam(0.004, beta1=0.899, beta2=0.999))
    assert (
        str(Adam(0.1) / SGD(1, horizon=5, every=2)) == "Adam(0.1) / SGD(1.0, horizon=5.0, every=2)"
    )
    assert parse("SGD(0.1, nesterov=True, momentum=0.9)") == Stack(
        SGD(lr=0.1, momentum=0.9, nesterov=True)
    )
    tall = AdaGrad(0.01) / RMSProp(1e-3) / AdamW(1e-4) / SGD(1e-6)
    assert parse("AdaGrad(0.01)/RMSProp(1e-3)/AdamW(1e-4)/SGD(1e-6)") == tall
    assert (AdaGrad(0.01) / RMSProp(1e-3)) / (AdamW(1e-4) / SGD(1e-6)) == tall
    assert tall.height == 3
    assert Adam(0.002).lr == 0.002 and Adam().beta1 == 0.9
    assert [level.values["lr"] for level in tall.levels] == [0.01, 1e-3, 1e-4, 1e-6]
    sizes = parse("SGD(0.1, momentum=0.9) / SGD({lr: 1e-5, momentum: 1e-6})")
    assert sizes == SGD(0.1, momentum=0.9) / SGD({"lr": 1e-5, "momentum": 1e-6})
    assert parse(sizes) is sizes


def test_what_the_level_above_moves():
    assert list(Adam().tuned) == ["lr", "beta1", "beta2"]
    assert list(SGD(0.1).tuned) == ["lr"]
    assert list(SGD(0.1, momentum=0.9).tuned) == ["lr", "momentum"]
    assert list(SGD(0.1)["momentum", "lr"].tuned) == ["lr", "momentum"]
    assert list(AdamW(0.1)["weight_decay"].tuned) == ["weight_decay"]
    assert str(SGD(0.1) / SGD(0.01)) == "SGD(0.1) / SGD(0.01)"
    assert str(Adam(0.001)["lr"] / SGD(1e-05)) == "Adam(0.001)[lr] / SGD(1e-5)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Adma(0.001)", "there is no rule 'Adma'; did you mean 'Adam'? (column 1"),
        ("Adamw(0.001)", "there is no rule 'Adamw'; did you mean 'AdamW'? (column 1"),
        ("sgd(0.1)", "there is no rule 'sgd'; did you mean 'SGD'? (column 1"),
        ("SGD(0.1) / Adm(0.001)", "there is no rule 'Adm'; did you mean 'Adam'? (column 12"),
        (
            "Foo(1)",
            "there is no rule 'Foo'; known are SGD, AdaGrad, RMSProp, Adadelta, Adam, Adamax, "
            "NAdam, AdamW, RAdam, Lion, ScheduleFreeAdam, Rprop, ASGD, Muon, Adafactor, "
            "SOAP (column 1",
        ),
        ("Adam(0.001, bata1=0.9)", "Adam has no argument 'bata1'; did you mean 'beta1'? (column 1"),
        ("Adam(1)[l] / SGD(1)", "Adam has no hyperparameter 'l'; did you mean 'lr'? (column 9"),
        ("Adam(1)[lr: lgo]", "there is no domain 'lgo'; did you mean 'log'? (column 9"),
        ("Adam(0.001, 1.0)", "beta1 must lie in [0, 1), but is 1 (column 1"),
        ("Adam(0.001, beta2=-0.5)", "beta2 must lie in [0, 1), but is -0.5 (column 1"),
        ("SGD(0.1) / RMSProp(0.1, 1.5)", "gamma must lie in [0, 1), but is 1.5 (column 12"),
        ("SGD(-0.1)", "SGD: lr must lie in [0, inf), but is -0.1 (column 1"),
        ("SGD(nan)", "SGD: lr must lie in [0, inf), but is nan (column 1"),
        (
            "Adam(1, beta1=0) / SGD(1)",
            "beta1 = 0 cannot be moved in the unit domain, which is (0, 1)",
        ),
        ("SGD(0)[lr: log] / SGD(1)", "lr = 0 cannot be moved in the log domain, which is (0, inf)"),
        (
            "Adam[lr, weight_decay] / SGD(1)",
            "weight_decay = 0 cannot be moved in the log domain, which is (0, inf); start it "
            "inside, or name another domain, as in [weight_decay: real]",
        ),
        (
            "SGD(1, 2, 3, 4)",
            "SGD has 3 hyperparameters (lr, momentum, weight_decay), not 4 (column 1",
        ),
        ("SGD(1, lr=2)", "SGD got lr twice (column 1"),
        ("SGD(lr=1, lr=2)", "lr is given twice (column 11"),
        ("SGD(1) / SGD({lr: 1, lr: 2})", "lr is given twice (column 22"),
        ("SGD(1)[lr, lr: log]", "lr is named twice (column 12"),
        ("SGD(lr=1, 2)", "a value without a name cannot follow one with a name (column 11"),
        ("SGD(lr=)", "expected a number, found ')' (column 8"),
        ("SGD(0.1) SGD(0.1)", "expected '/' or the end, found 'SGD' (column 10"),
        ("SGD(0.1) / ", "expected the name of a rule, found 'the end' (column 12"),
        ("SGD(0.1, nesterov=2)", "SGD: nesterov must be a bool, not 2.0 (column 1"),
        ("SGD(0.1 0.2)", "expected ',' or ')', found '0.2' (column 9"),
        ("SGD(0.1) ~ SGD(1)", "'~' does not belong here (column 10"),
        ("", "expected the name of a rule, found 'the end' (column 1"),
        (
            "SGD(0.1)[] / SGD(1)",
            "SGD(1.0) has nothing to move: SGD(0.1)[] has no tuned hyperparameter",
        ),
        (
            "SGD(0.1) / SGD({lr: 1, momentum: 2})",
            "lr must have one value for each of lr, the hyperparameters that it moves",
        ),
        ("SGD({lr: 1})", "lr must be one number on the lowest level"),
        ("SGD(lr=(1, 2))", "SGD: lr must be a number, not (1.0, 2.0) (column 1"),
        ("Adam(1, betas=(0.9, 0.99)", "expected ',' or ')', found 'the end' (column 26"),
        ("RMSProp(0) / SGD(1)", "RMSProp(0.0): lr = 0 would stay 0, since the derivative"),
        ("Adam(1, v0=-1)", "Adam: v0 must be 0 or more, but is -1.0 (column 1"),
        ("Adam(1, v0=nan)", "Adam: v0 must be 0 or more, but is nan (column 1"),
        ("AdaGrad(1, initial_accumulator_value=-1)", "must be 0 or more, but is -1.0 (column 1"),
        ("ScheduleFreeAdam(1, r=-1)", "ScheduleFreeAdam: r must be 0 or more, but is -1.0"),
    ],
)
def test_errors_name_the_mistake_and_its_column(text, message):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert repr(text) in str(caught.value), "the message shows the stack"
    assert len(str(caught.value).splitlines()) == 1


def test_all_names_of_the_notation_can_be_imported():
    known = {name for name, rule in RULES.items() if rule.__module__ == "hyperopt.rules"}
    assert known <= {*hyperopt.__all__} and all(hasattr(hyperopt, name) for name in known)


def test_python_errors_say_the_same_without_a_column():
    with pytest.raises(TypeError, match=r"^Adam has no argument 'bata1'; did you mean 'beta1'\?$"):
        Adam(bata1=0.9)
    with pytest.raises(ValueError, match=r"^Adam: beta1 must lie in \[0, 1\), but is 1$"):
        Adam(beta1=1)
    with pytest.raises(ValueError, match=r"^SGD: lr must be a number, not 'fast'$"):
        SGD("fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has nothing to move"):
        SGD(0.1)[()] / SGD(0.1)
    with pytest.raises(TypeError, match=r"^a stack is a notation, .* not <class .*; write SGD\("):
        parse(SGD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^SGD\[...\] takes the names 'lr', 'momentum', .* not 0$"):
        SGD(0.1)[0]  # type: ignore[index]


def test_numbers_of_numpy_are_numbers():
    stack = SGD(np.float32(0.5), nesterov=False) / SGD(
        1e-3, clip_norm=np.float64(10), every=np.int64(5)
    )
    assert str(stack) == "SGD(0.5) / SGD(0.001, clip_norm=10.0, every=5)"
    assert parse(str(stack)) == stack
    for wrong in (1.5, True, "often"):
        with pytest.raises(ValueError, match=rf"^SGD: every must be an int, not {wrong!r}$"):
            SGD(1e-3, every=wrong)


def test_only_a_rule_can_be_put_on_top():
    for wrong in (1e-5, "SGD(1e-5)", Adam, None):
        for below in (Adam(1e-3), Adam(1e-3) / SGD(1e-5)):
            with pytest.raises(
                TypeError, match=r"^a level is a rule, as in .* / SGD\(1e-5\), not "
            ):
                below / wrong  # type: ignore[operator]


def test_betas_as_torch_writes_them():
    assert AdamW(1e-3, betas=(0.8, 0.95)) == AdamW(1e-3, 0.8, 0.95)
    assert parse("AdamW(1e-3, betas=(0.8, 0.95))") == Stack(AdamW(1e-3, 0.8, 0.95))
    with pytest.raises(TypeError, match=r"^Adam got beta1 twice$"):
        Adam(beta1=0.8, betas=(0.8, 0.95))
    for wrong in (0.9, (0.9, 0.99, 0.999)):
        with pytest.raises(ValueError, match=r"^betas stands for beta1, beta2, and cannot be "):
            Adam(betas=wrong)
    with pytest.raises(TypeError, match=r"^SGD has no argument 'betas'"):
        SGD(betas=(0.8, 0.95))
