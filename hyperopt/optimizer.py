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
    """An optimizer that moves the weights and its own hyperparameters, by a stack of rules.

    The lowest rule moves the weights. Each further rule moves the hyperparameters of the rule below
    it, by their hypergradients (Chandra et al. 2022; see `hyperopt.algorithm`). Use it like any
    `torch.optim` optimizer: ``zero_grad()``, ``loss.backward()``, ``step()``. The model is not
    differentiated twice, so a plain ``loss.backward()`` is enough.

    ``param_groups[i]["lr"]`` is the current value. For a tuned hyperparameter it is a 0-dim tensor,
    and later steps change it. To log it, keep ``float(...)`` of it, or the result of
    `hyperparameters` or `snapshot`. For other hyperparameters it is a number. You or a scheduler
    may set it between steps.

    A learning-rate scheduler *scales* a tuned lr. The rule then uses the *effective* lr, which is
    the learned lr times ``group["lr"] / group["initial_lr"]``. The hypergradient is that of the
    effective lr, by the chain rule. With a scheduler, ``group["lr"]`` is the scheduler's own
    number. Without a scheduler it is the effective lr, and you may set it: the ratio of your number
    and the learned lr is a factor from then on. Other tuned hyperparameters cannot be set.

    ``state[p]`` is the rule's state of a parameter, in views that you may write to. If the next
    step recomputes the last update (an elementwise rule that is tuned, with horizon 1), it is the
    state before that update. Otherwise it is the state after it. You may add keys of your own to
    ``state[p]`` and to param groups. They are kept, saved and loaded.

    Args:
        params: parameters or param groups. A group may have its own values of the lowest rule's
            hyperparameters, as in ``{"params": ..., "lr": 0.1}``. If such a hyperparameter is
            tuned, the group tunes its own value, apart from the other groups.
        stack: a `Stack`, a single `Rule`, or their notation, as ``"Adam(0.001) / SGD(1e-5)"``. A
            group may have its own stack, as in ``{"params": ..., "stack": "Muon(0.02)"}``. Groups
            with equal stacks share hyperparameters, and groups with different stacks do not.
        compile: whether to compile the step, which takes a few seconds. True compiles at the first
            step, False never. ``"auto"`` runs the first 20 steps eagerly and then compiles, so that
            a short script does not wait. Eager steps compute the same, but slower. Without a C++
            compiler all steps are eager.

    Raises:
        ValueError: the stack does not parse, a value is outside its domain, the list of parameters
            is empty, or the parameters are on several devices.
        TypeError: a parameter is complex, sparse, or of a FullyShardedDataParallel.
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
                raise ValueError("a param group has no stack; give it a stack, or give one for all")
            self._engine = Mixture(stacks, default, compile)
        elif default is None:
            raise ValueError("no stack was given; give one for all or one in each param group")
        else:
            self._engine = Engine(default, compile)
        self.stack = self.stacks[0]
        defaults: dict[str, Any] = {}  # with several stacks, each group has its own
        if isinstance(self._engine, Engine):
            defaults |= self._engine.stack.levels[0].values
        if self._engine.betas:
            defaults["betas"] = tuple(defaults[name] for name in self._engine.betas)
        super().__init__(params, defaults)
        self._engine.start()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, which may have its own values of the lowest rule's hyperparameters.

        Args:
            param_group: a dict with ``params``, and optionally hyperparameters and a ``stack``.

        Raises:
            ValueError: a key is nearly a hyperparameter's name, or a value is outside its domain.
            TypeError: a parameter is complex or sparse.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group is a dict with params, not {param_group!r}")
        if isinstance(param_group.get("params"), Iterator):  # can be read only once
            param_group["params"] = list(param_group["params"])
        group = dict(param_group)  # do not change the caller's dict
        own = self._engine.check_group(group)
        super().add_param_group(group)
        self._engine.add_group(own)

    @disable_dynamo  # Dynamo would trace the step wrongly
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the hyperparameters of all levels, from the top, and then the weights.

        A parameter whose ``grad`` is None does not change. Its last update no longer counts: it
        adds 0 to the hypergradients of its next step, unless the horizon is long. If a gradient or
        its square is not finite, a tower moves nothing and `skipped` counts the step.

        Args:
            closure: computes the loss again and returns it. It is called once, with gradients
                enabled, before the update.

        Returns:
            the result of ``closure``, or None without one.

        Raises:
            TypeError: a gradient is sparse.
            ValueError: a tuned hyperparameter other than lr was set in a param group, parameters
                are now on several devices, a param group was removed, a parameter changed its
                shape, or a parameter with its own hyperparameters changed its position.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engine.step()
        return loss

    @property
    def stacks(self) -> list[Stack]:
        """The different stacks of the param groups. The first one is ``stack``."""
        return self._engine.stacks

    # Plain attributes in torch.optim.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in ``torch.optim``."""
        return self._engine.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._engine.groups = groups

    @property
    def state(self) -> defaultdict[Tensor, State]:
        """The rule's state of each parameter.

        Before the first step it is the initial state, because `torch.distributed.checkpoint` loads
        a state in place. The next step uses your changes. If you delete all of the rule's entries
        of a parameter, the rule starts again from its current weights. Entries with other names
        stay unchanged.
        """
        return self._engine.state

    @state.setter
    def state(self, state: defaultdict[Tensor, State]) -> None:
        self._engine.state = state

    # Reading the hyperparameters.

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers in a `snapshot`, as ``"0.lr"``: the level, the hyperparameter.

        The value of one param group is ``"0.lr[1]"``. If groups have their own stacks, each value
        is per group. The value for one hyperparameter below is ``"1.lr[beta1]"``. The value of one
        tensor is ``"0.lr[hidden.weight]"`` if the parameters have names, as from
        ``model.named_parameters()``, and ``"0.lr[p3]"`` otherwise, counted from 0. Values per
        element are in ``state[p]`` instead.

        After a tuned lr has been scaled, the last name is ``"0.effective_lr"``: the lr that the
        rule uses. With several param groups there is one for each, as ``"0.effective_lr[1]"``.
        """
        return self._engine.names

    def snapshot(self) -> Tensor:
        """The current values of all hyperparameters, in the order of `names`.

        Returns:
            a new tensor, float64, 1-D, on the parameters' device. The call does not wait for the
            device.
        """
        return self._engine.snapshot()

    def hyperparameters(self) -> list[dict[str, float]]:
        """The current values of each level's hyperparameters, lowest level first.

        ``"lr"`` is the learned value. If a scheduler scales it, ``"effective_lr"`` is the value
        that the rule uses.
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

        They are the estimates that the level above used: derivatives of the loss with respect to
        the raw values or, with ``normalize``, cosines. They are clipped if that level clips. They
        are 0 in the first step, and NaN in a skipped step.

        Returns:
            a new tensor, float64, 1-D, one number for each tuned hyperparameter. `names` begins
            with these hyperparameters. The call does not wait for the device.
        """
        return self._engine.hypergradients

    @property
    def skipped(self) -> list[int]:
        """For each level, the number of updates skipped because a value was not finite.

        With several stacks it is the sum over the stacks.
        """
        return self._engine.skipped

    @property
    def compile(self) -> bool | str:
        """The constructor's ``compile``: True, False or "auto"."""
        return self._engine.compile

    @property
    def compiled(self) -> bool:
        """Whether the last step was compiled."""
        return self._engine.is_compiled

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        # Leave out hooks, as torch.optim does. Leave out a scheduler's wrapper of `step` too: it
        # would step the original.
        return {name: self.__dict__[name] for name in ("defaults", "stack", "_engine")}

    def state_dict(self) -> dict[str, Any]:
        """The state that a run needs to continue bit for bit, as tensors, numbers and strings.

        ``state`` has the numbers of the parameters as keys, as in ``torch.optim``. Its tensors have
        the parameter's shape: the rule's state and, if the next step recomputes the last update,
        the gradient of that update and, if needed, the weights before it. Each tensor is divided
        over processes like its parameter.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self._engine.save()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it belongs to another stack, is incomplete, or its parameters differ in
                number, shape or division over processes. The optimizer is then unchanged.
        """
        state_dict = copy.copy(state_dict)  # a hook of torch may expect this
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        expected = {"state", "param_groups"}
        if not isinstance(state_dict, dict) or not expected <= state_dict.keys():
            found = [*state_dict] if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"expected a dict with state and param_groups, found {found}")
        self._engine.load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
