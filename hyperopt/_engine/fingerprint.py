"""Fingerprints of code: values that change when a function, or a global that it reads, is edited.

They are part of the keys of kernels. So after an edit in a notebook, or a reload, of a rule, a
function, a constant or a domain, its kernels are compiled again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from .torch_private import version_of

# Modules that users do not edit: the names of their functions and classes are enough.
_FIXED = {*sys.stdlib_module_names, "torch", "numpy"}
_OURS = {f"{__name__.partition('.')[0]}.{module}" for module in ("rule", "domains")}

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def fingerprint(*things: Any) -> Hashable:
    """Compute a value that is equal for equal code.

    It covers the code, defaults, closure and globals of a function, the attributes of a class, and
    the class and attributes of an object. Other things compare by identity.
    """
    walk = _Walk()
    for thing in things:
        walk.over(thing)
    return walk.digest.hexdigest(), *walk.same


class _Same:
    """Compare a thing by identity. A reference to it prevents reuse of its id."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _Walk:
    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.same: list[_Same] = []
        self.seen: dict[int, int] = {}  # from ids of visited things to their numbers
        self.kept: list[Any] = []  # references, so that no id is reused

    def say(self, *words: Any) -> None:
        self.digest.update(repr(words).encode())

    def over(self, thing: Any) -> None:
        if thing is None or isinstance(thing, _PLAIN):
            self.say(type(thing).__name__, thing)  # tells 0.0 from -0.0, and 1 from True
        elif id(thing) in self.seen:
            self.say("again", self.seen[id(thing)])
        else:
            self.seen[id(thing)] = len(self.seen)
            self.kept.append(thing)
            self.say(type(thing).__qualname__)
            for part in self.inside(thing):
                self.over(part)
            self.say("end")

    def inside(self, thing: Any) -> Iterable[Any]:
        """The parts of a thing."""
        if isinstance(thing, torch.Tensor):
            if thing.numel() <= 64 and thing.device.type == "cpu":
                return str(thing.dtype), thing.tolist()
            self.same.append(_Same(thing))
            return (version_of(thing),)
        if isinstance(thing, CodeType):
            names = thing.co_names, thing.co_varnames, thing.co_freevars
            return thing.co_code, repr(names), *thing.co_consts
        if isinstance(thing, ModuleType):
            return (thing.__name__,)
        if isinstance(thing, (FunctionType, type)) and _is_fixed(thing):
            return thing.__module__, thing.__qualname__
        if isinstance(thing, FunctionType):
            closed = (_content(cell) for cell in thing.__closure__ or ())
            own = thing.__code__, thing.__defaults__, thing.__kwdefaults__
            return *own, *closed, *_reads(thing)
        if isinstance(thing, MethodType):
            return thing.__func__, thing.__self__
        if isinstance(thing, (staticmethod, classmethod)):
            return (thing.__func__,)
        if isinstance(thing, property):
            return thing.fget, thing.fset
        if isinstance(thing, type):
            bases = thing.__mro__[1:]
            return *_attributes(vars(thing)), *bases
        if isinstance(thing, Mapping):
            return [part for item in thing.items() for part in item]
        if isinstance(thing, (list, tuple)):
            return thing
        if isinstance(thing, (set, frozenset)):
            return sorted(thing, key=repr)
        if isinstance(thing, BuiltinFunctionType) or not hasattr(thing, "__dict__"):
            self.same.append(_Same(thing))
            return ()
        return type(thing), *_attributes(vars(thing))


def _is_fixed(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or ""
    if "<" in thing.__qualname__:  # lambdas and inner functions may share a name
        return False
    return module in _OURS or module.partition(".")[0] in _FIXED


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


# Attributes of a class that do not affect its computations.
_ASIDE = {"__dict__", "__weakref__", "__doc__", "__annotations__", "__module__", "__firstlineno__"}
_ASIDE |= {"__static_attributes__", "__abstractmethods__", "_abc_impl", "__annotate_func__"}


def _attributes(members: Mapping[str, Any]) -> Iterator[Any]:
    for name in members:
        if name not in _ASIDE:
            yield name
            yield members[name]


def _reads(function: FunctionType) -> Iterator[Any]:
    """The globals that a function or its inner functions may read, and attributes of modules."""
    names: dict[str, None] = {}
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= dict.fromkeys(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    space = function.__globals__
    for name in names:
        if name not in space:
            continue
        value = space[name]
        yield name
        yield value
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _FIXED:
            yield from _attributes({own: vars(value)[own] for own in names if own in vars(value)})
