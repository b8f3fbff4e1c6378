"""`HyperOptimizer`: a stack of rules as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ._engine.engine import Engine
from ._engine.mixture import Mixture
from ._engine.torch_private import disable_dynamo
from .notation import parse
from .rule import Rule, Stack, State


class HyperOptimizer(torch.optim.Optimizer):
    """Moves weights by the lowest rule of a stack, and each rule's hyperparameters by the next one.

    Use it like any `torch.optim` optimizer: ``zero_grad()``, backward, ``step()``. Hypergradients
    move the hyperparameters (Chandra et al. 2022; see `hyperopt.algorithm`). They need no second
    derivative of the model: a plain ``loss.backward()`` is all.

    ``param_groups[i]["lr"]`` reads as the current value. For a hyperparameter that is tuned this is
    a 0-dim tensor that later steps change; to log it, keep ``float(...)`` of it, or the result of
    `hyperparameters` or `snapshot`. Otherwise it is a number, and you or a scheduler may set it
    between steps.

    A learning-rate scheduler *scales* an lr that is tuned. The rule then uses the *effective* lr,
    the learned one times ``group["lr"] / group["initial_lr"]``. The hypergradient is that of the
    effective lr, by the chain rule. With a scheduler ``group["lr"]`` is the scheduler's own number.
    Without one it is the effective lr, which you may set. Other hyperparameters that are tuned
    cannot be set.

    ``state[p]`` is the rule's state of a parameter, in views that may be written to. With height 0
    or a long horizon it is the state after the last step, otherwise the state before it.
    Other keys, there and in param groups, are yours: they stay, and are saved and loaded.

    Args:
        params: parameters or param groups. A group may give hyperparameters of the lowest rule a
            value of its own, as in ``{"params": ..., "lr": 0.1}``; one that is tuned is then tuned
            apart from that of the other groups.
        stack: a `Stack`, a single `Rule`, or their notation, as ``"Adam(0.001) / SGD(1e-5)"``. A
            group may have one of its own, as in ``{"params": ..., "stack": "Muon(0.02)"}``. Groups
            of equal stacks share hyperparameters; those of others do not.
        compile: whether to compile the step, which takes a few seconds. ``"auto"`` makes the first
            20 steps eagerly and then compiles, so that a short script need not wait; True compiles
            at the first step, False never. Eager steps compute the same, slower; without a C++
            compiler all steps are eager.

    Raises:
        ValueError: a stack that does not parse, a value outside its domain, an empty list of
            parameters, parameters on several devices.
        TypeError: complex or sparse parameters, or those of FullyShardedDataParallel.
    """

    def __init__(
        self,
        params: Iterable[Any],
        stack: Stack | Rule | str | None = None,
        *,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        if not isinstance(params, Tensor):
            params = list(params)
        default = None if stack is None else parse(stack)
        groups = [group for group in params if isinstance(group, dict)]
        own = [parse(group["stack"]) if "stack" in group else default for group in groups]
        self._engine: Engine | Mixture
        if any(each != default for each in own):
            stacks = [each for each in own if each is not None]
            if len(stacks) < len(own):
                raise ValueError("a param group has no stack; give it one, or one for all groups")
            self._engine = Mixture(stacks, default, compile)
        elif default is None:
            raise ValueError("no stack was given, neither for all parameters nor in a param group")
        else:
            self._engine = Engine(default, compile)
        self.stack = self.stacks[0]
        defaults: dict[str, Any] = {}  # of several stacks each group has its own
        if isinstance(self._engine, Engine):
            defaults |= self._engine.stack.levels[0].values
        if self._engine.betas:
            defaults["betas"] = tuple(defaults[name] for name in self._engine.betas)
        super().__init__(params, defaults)
        self._engine.start()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with values of their own for any hyperparameters of the lowest rule.

        Raises:
            ValueError: a key that is nearly a hyperparameter's name, a value outside its domain.
            TypeError: complex or sparse parameters.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group is a dict with params, not {param_group!r}")
        if isinstance(param_group.get("params"), Iterator):  # which can be read only once
            param_group["params"] = list(param_group["params"])
        group = dict(param_group)  # the caller's stays as it is
        own = self._engine.check_group(group)
        super().add_param_group(group)
        self._engine.add_group(own)

    @disable_dynamo  # it would trace the step wrongly
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the hyperparameters of all levels, from the top, and then the weights.

        Parameters whose ``grad`` is None stay as they are, state included, as in ``torch.optim``.

        Args:
            closure: computes the loss again and returns it; ``step`` then returns that. It is
                called once, with gradients enabled, before anything is moved.

        Raises:
            TypeError: a sparse gradient.
            ValueError: a tuned hyperparameter other than lr was set in a param group, parameters
                were moved to several devices, a param group was taken away, a parameter changed its
                shape, or one that has hyperparameters to itself its place among the others.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engine.step()
        return loss

    @property
    def stacks(self) -> list[Stack]:
        """The different stacks of the param groups; the first of them is ``stack``."""
        return self._engine.stacks

    # Where torch.optim has plain attributes.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in ``torch.optim``."""
        return self._engine.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._engine.groups = groups

    @property
    def state(self) -> defaultdict[Tensor, State]:
        """The rule's state of each parameter; before the first step, the initial one.

        (`torch.distributed.checkpoint` loads a state in place, and so needs a place then already.)
        What is put into it, or taken out, holds from the next step on. For a parameter that has no
        entry of the rule any more, the rule starts again from the weights as they are. Entries with
        other names stay as they are.
        """
        return self._engine.state

    @state.setter
    def state(self, state: defaultdict[Tensor, State]) -> None:
        self._engine.state = state

    # Reading the hyperparameters.

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers in a `snapshot`, as ``"0.lr"``: the level, the hyperparameter.

        A per-group value is ``"0.lr[1]"``, as is each value where groups have stacks of their own.
        A value for one hyperparameter below is ``"1.lr[beta1]"``. A per-tensor value is
        ``"0.lr[hidden.weight]"`` if the parameters were given with their names, as by
        ``model.named_parameters()``, and else ``"0.lr[p3]"``, counted from 0. Values per element
        are not here, but in ``state[p]``.

        Once a tuned lr has been scaled, the lr that the rule uses stands at the end, as
        ``"0.effective_lr"``; with several param groups, as ``"0.effective_lr[1]"`` for each.
        """
        return self._engine.names

    def snapshot(self) -> Tensor:
        """The current values of all hyperparameters in the order of `names`, as a new tensor.

        It is float64, 1-D, on the parameters' device; nothing waits for that device.
        """
        return self._engine.snapshot()

    def hyperparameters(self) -> list[dict[str, float]]:
        """The current values of each level's hyperparameters, lowest level first.

        ``"lr"`` is the learned value; where a scheduler scales it, ``"effective_lr"`` is what the
        rule uses.
        """
        stacks = self.stacks
        height = max(stack.height for stack in stacks)
        found: list[dict[str, float]] = [{} for _ in range(height + 1)]
        for name, value in zip(self.names, self.snapshot().tolist(), strict=True):
            level, _, slot = name.partition(".")
            found[int(level)][slot] = value
        order = [
            [*(n for s in stacks if k <= s.height for n in s.levels[k].hypers), "effective_lr"]
            for k in range(height + 1)
        ]
        return [
            dict(sorted(values.items(), key=lambda item: names.index(item[0].partition("[")[0])))
            for names, values in zip(order, found, strict=True)
        ]

    def hypergradients(self) -> Tensor:
        """The hypergradients of the last step, in the order of `names`.

        They are the estimates that the level above was given: derivatives of the loss with respect
        to the raw values or, with ``normalize``, cosines. They are clipped if that level clips, 0
        in the first step, and NaN in a step that was skipped. A new tensor, float64, 1-D, of one
        number for each tuned hyperparameter (`names` begins with these). Nothing waits for the
        device.
        """
        return self._engine.hypergradients

    @property
    def skipped(self) -> list[int]:
        """For each level, how many updates were left out because something was not finite.

        Several stacks are added up.
        """
        return self._engine.skipped

    @property
    def compile(self) -> bool | str:
        """Whether steps are to be compiled: True, False or "auto"."""
        return self._engine.compile

    @property
    def compiled(self) -> bool:
        """Whether the last step was compiled."""
        return self._engine.is_compiled

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as in torch.optim. So does the `step` that a scheduler puts in front of
        # ours, which would move the original.
        return {name: self.__dict__[name] for name in ("defaults", "stack", "_engine")}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, as tensors, numbers and strings.

        ``state`` is, as in ``torch.optim``, by the number of the parameter: the rule's state in the
        parameter's shape and, if the last update must be recomputed, its gradient and, where
        needed, the weights before it. Everything is divided over processes like the parameter.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self._engine.save()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it belongs to another stack, is incomplete, or its parameters differ from
                these in number, shape or their division over processes. Then nothing has changed.
        """
        state_dict = copy.copy(state_dict)  # as a hook of torch may expect
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        expected = {"state", "param_groups"}
        if not isinstance(state_dict, dict) or not expected <= state_dict.keys():
            found = [*state_dict] if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"expected a dict with state and param_groups, found {found}")
        self._engine.load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
