"""The notation of stacks, such as ``"Adam(0.001)[lr] / SGD(1e-5)"``; ``str(stack)`` writes it.

stack = level ("/" level)*                 lowest level first
level = rule ["(" arguments ")"] ["[" moved "]"]
arguments = values in the order of the rule's hyperparameters, then name=value
value = number | True | False | word | {hyperparameter: number, ...} | (number, ...)
moved = the hyperparameters that the level above moves, each as name or name: how
how = [domain] ["from" number] ["to" number] ["per" (run | group | tensor | element)]

Keywords of every level above the lowest, as in SGD(1e-5, clip_norm=1). They set how this level
moves the hyperparameters of the level below:

clip_value, clip_norm    clip their hypergradient; higher levels see the clipped hypergradient
every=10                 move them only in every tenth step
until=1000               move them only in the first thousand steps
normalize=True           make the hypergradient a cosine: divide it by the norms of both factors
surrogate=True           divide the hypergradient by the squared norm of the gradient that the last
                         update used

Keywords of the level directly above the lowest:

horizon=n    Judge a hyperparameter by its effect over the last n steps. The paper uses n = 1. The
             derivatives d of the weights are accumulated: at the t-th update,
             s <- (1 - 1/min(t, n)) s + d. With n = inf, an lr in the log domain, and a rule whose
             updates are proportional to lr, s is the current weights minus the mean of all earlier
             weights. When a hyperparameter falls below a thousandth of its peak, s and t start
             again. Otherwise the old derivatives would outweigh all new ones.
trust=0.1    Bound the norm of one update of the weights by a tenth of the norm of the weights. lr
             is lowered to meet the bound, and must be in the log domain. trust is a hyperparameter
             of its level. The next level can move it, as in
             SGD(0.1)[lr: log] / SGD(0.2, trust=0.1)[lr, trust] / SGD(1e-3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from .rule import RULES, Rule, Stack
from .tuning import did_you_mean


def parse(text: str | Rule | Stack, rules: Mapping[str, type[Rule]] = RULES) -> Stack:
    """Read the notation of a stack.

    Args:
        text: the notation. A rule or a stack is accepted too.
        rules: the known rules by name.

    Raises:
        ValueError: the notation has an error. The message is one line, with the column.
        TypeError: ``text`` is not a string, a rule or a stack.
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
        """Go to the next token. Returns the text of the current one."""
        text = getattr(self, "token", "")
        match = self.TOKEN.match(self.text, self.next)
        if match is None:
            self.start = len(self.text) - len(self.text[self.next :].lstrip())
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

    def accept(self, mark: str) -> bool:
        if self.token == mark and self.kind == "mark":
            self.advance()
            return True
        return False

    def stack(self) -> Stack:
        levels = [self.level()]
        while self.accept("/"):
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
            self.fail(f"there is no rule {name!r}; {did_you_mean(name, self.rules)}", start)
        arguments, keywords = self.arguments() if self.accept("(") else ([], {})
        try:
            rule = self.rules[name](*arguments, **keywords)
        except (TypeError, ValueError) as error:
            self.fail(str(error), start)
        return self.moved(rule) if self.accept("[") else rule

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        values: list[Any] = []
        named: dict[str, Any] = {}
        while not self.accept(")"):
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
        if self.kind == "name":
            return self.advance()
        if self.accept("("):
            return self.numbers()
        if not self.accept("{"):
            return float(self.expect("number", "a number"))
        numbers: dict[str, float] = {}
        while not self.accept("}"):
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
        while not self.accept(")"):
            found.append(float(self.expect("number", "a number")))
            if self.token != ")":
                self.expect(",", "',' or ')'")
        return tuple(found)

    def moved(self, rule: Rule) -> Rule:
        items: list[str] = []
        while not self.accept("]"):
            start = self.start
            item = self.expect("name", "the name of a hyperparameter")
            if item in (known.partition(":")[0] for known in items):
                self.fail(f"{item} is named twice", start)
            if self.accept(":"):
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
