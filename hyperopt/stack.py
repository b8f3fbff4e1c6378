"""Stacks of rules, and the notation for them: ``"Adam(0.001)[lr] / SGD(1e-5)"`` both ways.

stack = level ("/" level)*                 lowest level first
level = rule ["(" arguments ")"] ["[" moved "]"]
arguments = values in the order of the rule's hyperparameters, then name=value
value = number | True | False | {hyperparameter: number, ...} | (number, ...), which betas takes
moved = hyperparameters that the level above moves, each as name or name: how
how = [domain] ["from" number] ["to" number] ["per" (run | group | tensor)]

A level above the lowest may also say how it moves the one below, as in SGD(1e-5, clip_norm=1):
clip_value and clip_norm clip the gradient that it is given (as those above it see it too), every=10
lets it move in one step of ten, and until=1000 in the first thousand alone. normalize=True makes
that gradient a cosine: it is divided by the norms of both factors of the inner product that it is.

Two more are for the level above the lowest. horizon=n judges a hyperparameter by its part in the
last n steps, and not in the last one alone: the derivatives d of the weights are gathered, at the
t-th step as D <- (1 - 1/min(t, n)) D + d. For an lr in the log domain and n = inf, and a rule whose
updates are proportional to lr, D is the way from the mean of all earlier weights to the present
ones. Where a hyperparameter falls to a thousandth of the most that it has been on the way, D and t
begin anew: what it added while it was large would else outweigh whatever it can add now. trust=0.1
lets what lr adds to the weights in one step, with most rules the whole update, be no larger than a
tenth of them, by their norms: lr, which must be in the log domain, is pulled down to that. Where it
is given, trust is a hyperparameter of its level: a further level moves it where it is named, as in
SGD(0.1)[lr: log] / SGD(0.2, trust=0.1)[lr, trust] / SGD(1e-3).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from .domains import LOG, SQUARE
from .rule import RULES, Rule, near


class Stack:
    """Rules on top of each other: each level moves the hyperparameters of the level below it.

    The lowest moves the weights; the hyperparameters of the topmost are constants. A plain
    optimizer is a stack of height 0.

    Raises:
        ValueError: a level has nothing to move, or its dict of values does not fit the level below.
    """

    def __init__(self, *levels: Rule) -> None:
        self.levels = levels
        for below, above in itertools.pairwise(levels):
            if not below.tuned:
                raise ValueError(
                    f"{above} has nothing to move: {below} leaves it no hyperparameter"
                )
            for name, how in below.tuned.items():
                values = below.values[name]
                for number in values.values() if isinstance(values, dict) else (values,):
                    if number not in how.domain:
                        raise ValueError(
                            f"{below}: {name} = {number:g} cannot be moved in the "
                            f"{how.domain.name} domain, which is ({how.domain.low:g}, "
                            f"{how.domain.high:g}); start it inside, or name another domain, as in "
                            f"[{name}: real]"
                        )
                    if number == 0 and how.domain is SQUARE:
                        raise ValueError(
                            f"{below}: {name} = 0 would stay 0, since the derivative of a square "
                            f"is 0 there; start it above, or leave it out of what is tuned"
                        )
                    if number not in how:
                        raise ValueError(
                            f"{below}: {name} = {number:g} is not within its bounds, from "
                            f"{how.low:g} to {how.high:g}"
                        )
                if how.per != "run" and below is not levels[0]:
                    raise ValueError(
                        f"{below}: {name} per {how.per} is for the lowest level; above it, give "
                        "one number for each hyperparameter below, as in {lr: 0.1, ...}"
                    )
        for name in vars(Rule).keys() & {*levels[0].arguments}:
            if getattr(levels[0], name) != getattr(Rule, name).default:
                hint = "; the weights' gradients are clipped by torch.nn.utils.clip_grad_norm_"
                raise ValueError(
                    f"{levels[0]}: {name} is for a level that moves hyperparameters"
                    + hint * name.startswith("clip")
                )
        for k, above in enumerate(levels[2:], 2):
            for name in ("horizon", "trust"):
                if getattr(above, name) != getattr(Rule, name).default:
                    raise ValueError(
                        f"{above}: {name} is for the level that moves the hyperparameters of the "
                        f"lowest one, and not for level {k}"
                    )
        logarithmic = [n for n, how in levels[0].tuned.items() if how.domain is LOG]
        if len(levels) > 1 and "trust" in levels[1].hypers and "lr" not in logarithmic:
            raise ValueError(
                f"{levels[1]}: trust bounds the lr of {levels[0]}, which must be moved in the "
                "log domain, as in [lr: log]"
            )
        for k, above in enumerate(levels):
            targets = list(levels[k - 1].tuned) if k else []
            for name, value in above.values.items():
                if isinstance(value, dict) and set(value) != set(targets):
                    raise ValueError(
                        f"{above}: {name} must have one value for each of "
                        f"{', '.join(targets) or 'none'}, the hyperparameters that it moves"
                        if k
                        else f"{above}: {name} must be one number on the lowest level"
                    )

    @property
    def height(self) -> int:
        return len(self.levels) - 1

    def __truediv__(self, above: Rule | Stack) -> Stack:
        if isinstance(above, Rule):
            return Stack(*self.levels, above)
        if isinstance(above, Stack):
            return Stack(*self.levels, *above.levels)
        raise TypeError(f"a level is a rule, as in {self} / SGD(1e-5), not {above!r}")

    def __str__(self) -> str:
        return " / ".join(map(str, self.levels))

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self.levels == other.levels

    def __hash__(self) -> int:
        return hash(self.levels)


def parse(text: str | Rule | Stack, rules: Mapping[str, type[Rule]] = RULES) -> Stack:
    """The stack that a notation stands for; a rule or a stack is taken as it is.

    Args:
        rules: those that the notation knows, by their names.

    Raises:
        ValueError: one line that says what is wrong and at which column.
        TypeError: it is neither a notation, a rule nor a stack.
    """
    if isinstance(text, Stack):
        return text
    if isinstance(text, Rule):
        return Stack(text)
    if not isinstance(text, str):
        hint = f"; write {text.__name__}(...)" if isinstance(text, type) else ""
        raise TypeError(f"a stack is a notation, a Rule or a Stack, not {text!r}{hint}")
    return _Parser(text, rules).stack()


class _Parser:
    TOKEN = re.compile(
        r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?inf|nan)(?![\w.])"
        r"|(?P<name>[A-Za-z_]\w*)|(?P<mark>[/()\[\]{},:=])|(?P<end>$))"
    )

    def __init__(self, text: str, rules: Mapping[str, type[Rule]]) -> None:
        self.text, self.rules = text, rules
        self.next = 0
        self.advance()

    def advance(self) -> str:
        """Step over the current token, whose text is returned."""
        text = getattr(self, "token", "")
        match = self.TOKEN.match(self.text, self.next)
        if match is None:
            self.start = (
                self.next + len(self.text[self.next :]) - len(self.text[self.next :].lstrip())
            )
            self.fail(f"{self.text[self.start]!r} does not belong here")
        self.kind = match.lastgroup or "end"
        self.token, self.start, self.next = match[self.kind], match.start(self.kind), match.end()
        return text

    def fail(self, why: str, start: int | None = None) -> NoReturn:
        column = (self.start if start is None else start) + 1
        raise ValueError(f"{why} (column {column} of the stack {self.text!r})")

    def expect(self, kind: str, what: str) -> str:
        if kind not in (self.kind, self.token):
            self.fail(f"expected {what}, found {self.token or 'the end'!r}")
        return self.advance()

    def took(self, mark: str) -> bool:
        if self.token == mark and self.kind == "mark":
            self.advance()
            return True
        return False

    def stack(self) -> Stack:
        levels = [self.level()]
        while self.took("/"):
            levels.append(self.level())
        if self.kind != "end":
            self.fail(f"expected '/' or the end, found {self.token!r}")
        try:
            return Stack(*levels)
        except ValueError as error:
            raise ValueError(f"{error} (in the stack {self.text!r})") from None

    def level(self) -> Rule:
        start = self.start
        name = self.expect("name", "the name of a rule")
        if name not in self.rules:
            self.fail(f"there is no rule {name!r}; {near(name, self.rules)}", start)
        arguments, keywords = self.arguments() if self.took("(") else ([], {})
        try:
            rule = self.rules[name](*arguments, **keywords)
        except (TypeError, ValueError) as error:
            self.fail(str(error), start)
        return self.moved(rule) if self.took("[") else rule

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        values: list[Any] = []
        named: dict[str, Any] = {}
        while not self.took(")"):
            start = self.start
            if self.kind == "name" and self.token not in ("True", "False"):
                name = self.advance()
                self.expect("=", f"'=' after {name}")
                if name in named:
                    self.fail(f"{name} is given twice", start)
                named[name] = self.value()
            elif named:
                self.fail("a value without a name cannot follow one with a name")
            else:
                values.append(self.value())
            if self.token != ")":
                self.expect(",", "',' or ')'")
        return values, named

    def value(self) -> Any:
        if self.token in ("True", "False"):
            return self.advance() == "True"
        if self.took("("):
            return self.numbers()
        if not self.took("{"):
            return float(self.expect("number", "a number"))
        numbers: dict[str, float] = {}
        while not self.took("}"):
            start = self.start
            name = self.expect("name", "the name of a hyperparameter")
            if name in numbers:
                self.fail(f"{name} is given twice", start)
            self.expect(":", f"':' after {name}")
            numbers[name] = float(self.expect("number", "a number"))
            if self.token != "}":
                self.expect(",", "',' or '}'")
        return numbers

    def numbers(self) -> tuple[float, ...]:
        found: list[float] = []
        while not self.took(")"):
            found.append(float(self.expect("number", "a number")))
            if self.token != ")":
                self.expect(",", "',' or ')'")
        return tuple(found)

    def moved(self, rule: Rule) -> Rule:
        items: list[str] = []
        while not self.took("]"):
            start = self.start
            item = self.expect("name", "the name of a hyperparameter")
            if item in (known.partition(":")[0] for known in items):
                self.fail(f"{item} is named twice", start)
            if self.took(":"):
                words = [self.expect("name", "the name of a domain")]
                while self.token not in (",", "]", ""):
                    words.append(self.advance())
                item += ": " + " ".join(words)
            try:
                _ = rule[item]
            except ValueError as error:
                self.fail(str(error), start)
            items.append(item)
            if self.token != "]":
                self.expect(",", "',' or ']'")
        return rule[tuple(items)]
