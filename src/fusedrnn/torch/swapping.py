"""Replacing the recurrent modules of a model by ours, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import fx, jit, nn
from torch.nn.utils import parametrize

from .base import Recurrent
from .modules import GRU, LSTM, RNN
from .steps import GRUCell, LSTMCell, RNNCell
from .transfer import changed_by_others, converted

_KINDS: tuple[type[Recurrent], ...] = (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
OURS: dict[type[nn.Module], Any] = {kind._theirs: kind for kind in _KINDS}
_SCRIPT = "change the model before torch.jit.script or torch.jit.trace"
# Calls of recurrent layers in graphs of TorchScript and torch.export.
_CALLS = re.compile(r"(aten|fusedrnn)(::|\.)(quantized_)?(lstm|gru|rnn_|forward|infer)")


class Swapped(NamedTuple):
    """The result of `swap` and `restore`; it prints as text.

    Attributes
    ----------
    replaced: the new modules, by their names in the model.
    kept: the reasons why other recurrent modules were not, by their names.

    >>> import torch, fusedrnn.torch as ft
    >>> done = ft.swap(torch.nn.ModuleList([torch.nn.GRU(3, 4)]))
    >>> list(done.replaced), done.kept
    (['0'], {})
    """

    replaced: dict[str, nn.Module]
    kept: dict[str, str]

    def __str__(self) -> str:
        return listed(self.replaced, self.kept) or "no recurrent module to replace"


def listed(replaced: dict[str, nn.Module], kept: dict[str, str]) -> str:
    """Return the replaced modules and the reasons for the others, a line each."""
    lines = [
        f"{name or 'the model'}: {type(module).__name__}({module.extra_repr()})"
        for name, module in replaced.items()
    ]
    return "\n".join(
        lines + [f"{name or 'the model'}: kept, {why}" for name, why in kept.items()]
    )


def swap(model: nn.Module) -> Swapped:
    """Replace every nn.LSTM, nn.GRU, nn.RNN and their cells in a model by ours.

    Parameters are shared, not copied, so existing optimizers continue to work; hooks,
    parametrizations and the mode (training or not) are transferred, too. A module that is used
    twice is replaced by one module.

    Parameters
    ----------
    model: a module that contains others; it is changed in place.

    Returns
    -------
    The replaced modules and those that were not; print it.

    Raises
    ------
    TypeError: model is not a module, or is one to replace, which cannot be done in place.

    >>> import torch, fusedrnn.torch as ft
    >>> from torch import nn
    >>> model = nn.ModuleDict({"encoder": nn.GRU(3, 4), "head": nn.Linear(4, 1)})
    >>> print(ft.swap(model))
    encoder: GRU(3, 4)
    """
    check_model(model)
    if kind_of(model, OURS) is not None:
        raise _itself(model, f"fusedrnn.torch.{kind_of(model, OURS).__name__}")
    return Swapped(*replace_modules(model, as_ours))


def restore(model: nn.Module) -> Swapped:
    """Replace every module of ours in a model by the module of torch.nn: the way back.

    Everything is shared and transferred as by `swap`. A module whose options change what it
    computes in a way that torch.nn lacks is kept, as is one with narrow weights. A model saved
    afterwards can be loaded where this package is not installed.

    Parameters, returns and errors are those of `swap`.

    >>> import torch, fusedrnn.torch as ft
    >>> from torch import nn
    >>> model = nn.ModuleDict({"encoder": ft.GRU(3, 4), "decoder": ft.LSTM(4, 5, clip=1.0)})
    >>> print(ft.restore(model))
    encoder: GRU(3, 4)
    decoder: kept, torch.nn.LSTM has no clip=1.0
    """
    check_model(model)
    if isinstance(model, Recurrent):
        raise _itself(model, f"torch.nn.{model._theirs.__name__}")
    return Swapped(*replace_modules(model, _as_torch))


def check_model(model: nn.Module) -> None:
    """Raise TypeError for an argument that is not a module, or is TorchScript."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if isinstance(model, jit.ScriptModule):
        raise TypeError(f"model must not be TorchScript, got {type(model).__name__}: {_SCRIPT}")


def _itself(model: nn.Module, name: str) -> TypeError:
    return TypeError(
        f"model must contain the modules to replace, got {model} itself: build {name} and load "
        "its state_dict"
    )


def replace_modules(
    model: nn.Module, make: Callable[[nn.Module], nn.Module | str | None]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Replace modules within a model; nothing is changed if an error is raised.

    ``make(old)`` returns the new module, the reason why a recurrent module is kept, or None
    for any other. Returns the new modules and the reasons, by the names of the modules.
    """
    made: dict[nn.Module, nn.Module | str | None] = {}
    replaced: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    changes = []
    itself = _in_graph(model) or make(model)
    if isinstance(itself, str):
        kept[""] = itself
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():
            path = f"{parent_name}.{name}" if parent_name else name
            if child is None or isinstance(parent, jit.ScriptModule):
                continue
            if child not in made:
                made[child] = _in_graph(child) or make(child)
            new = made[child]
            if isinstance(new, str):
                kept[path] = new
            elif new is not None:
                changes.append((parent, name, new))
                replaced[path] = new
    for parent, name, new in changes:
        setattr(made.get(parent) or parent, name, new)
    return replaced, kept


def kind_of(module: nn.Module, kinds: Mapping[type[nn.Module], Any]) -> Any:
    """Return the class of `kinds` that replaces a module, or None."""
    return kinds.get(parametrize.type_before_parametrizations(module))


def _in_graph(module: nn.Module) -> str | None:
    """Return why a module is kept whose recurrent layers are calls in a graph."""
    if isinstance(module, jit.ScriptModule):
        graph, why = getattr(module, "inlined_graph", None), f"it is TorchScript: {_SCRIPT}"
    elif isinstance(module, fx.GraphModule):
        graph, why = (
            module.graph,
            "its graph has the calls: change the model before torch.export",
        )
    else:
        return None
    return why if _CALLS.search(str(graph)) else None


def as_ours(old: nn.Module) -> nn.Module | str | None:
    """Return a module of ours with everything of one of torch.nn, or why there is none."""
    kind = kind_of(old, OURS)
    if kind is not None:
        return converted(old, kind)
    if isinstance(old, (nn.RNNBase, nn.RNNCellBase)):
        return changed_by_others(old) or f"{type(old).__name__} is a subclass"
    if type(old).__module__.startswith("torch.ao.") and type(old).__name__ in _NAMES:
        return "it is one of torch.ao.quantization: swap before that"
    return None


def _as_torch(old: nn.Module) -> nn.Module | str | None:
    return old._as_torch() if isinstance(old, Recurrent) else None


_NAMES = [kind.__name__ for kind in OURS]
