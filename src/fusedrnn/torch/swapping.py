"""Replacing the recurrent modules of a model by ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from .modules import GRU, LSTM, RNN
from .steps import GRUCell, LSTMCell, RNNCell

OURS: dict[type[nn.Module], Any] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
_ARGUMENTS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "nonlinearity",
)
_OF_TORCH = ("_flat_weight", "_all_weights")


class Swapped(NamedTuple):
    """The result of `swap`; it prints as text.

    Attributes
    ----------
    replaced: the new modules, by their names in the model.
    kept: the reasons why recurrent modules of torch.nn were not replaced, by their names.

    >>> import torch, fusedrnn.torch as ft
    >>> done = ft.swap(torch.nn.ModuleList([torch.nn.GRU(3, 4)]))
    >>> list(done.replaced), done.kept
    (['0'], {})
    """

    replaced: dict[str, nn.Module]
    kept: dict[str, str]

    def __str__(self) -> str:
        return listed(self.replaced, self.kept) or "no recurrent module of torch.nn"


def listed(replaced: dict[str, nn.Module], kept: dict[str, str]) -> str:
    """Return the replaced modules and the reasons for the others, a line each."""
    lines = [
        f"{name or 'the model'}: {type(module).__name__}({module.extra_repr()})"
        for name, module in replaced.items()
    ]
    return "\n".join(lines + [f"{name}: kept, {why}" for name, why in kept.items()])


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if kind_of(model, OURS) is not None:
        raise TypeError(
            f"model must contain the modules to replace, got {model} itself: build "
            f"fusedrnn.torch.{kind_of(model, OURS).__name__} and load its state_dict"
        )
    done = Swapped({}, {})
    replace_modules(model, OURS, as_ours, done.replaced, done.kept)
    return done


def replace_modules(
    model: nn.Module,
    kinds: Mapping[type[nn.Module], Any],
    make: Callable[[nn.Module, Any], nn.Module],
    replaced: dict[str, nn.Module],
    kept: dict[str, str],
) -> None:
    """Replace the modules within a model whose class is a key of `kinds`.

    ``make(old, the class of kinds)`` returns the new module. The new modules, and the reasons
    why others were not replaced, are put into the two dicts by their names.
    """
    made: dict[nn.Module, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            path = f"{parent_name}.{name}" if parent_name else name
            kind = None if child is None else kind_of(child, kinds)
            if child is None or kind is None:
                if isinstance(child, tuple(kinds)):
                    kept[path] = f"{type(child).__name__} is a subclass"
                continue
            if child not in made:
                made[child] = make(child, kind)
            setattr(parent, name, made[child])
            replaced[path] = made[child]


def kind_of(module: nn.Module, kinds: Mapping[type[nn.Module], Any]) -> Any:
    """Return the class of `kinds` that replaces a module, or None."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    return kinds.get(kind)


def transfer_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the hooks of another one."""
    for name, value in old.__dict__.items():
        if name.endswith(("_hooks", "_hook")) or "_hooks_" in name:
            new.__dict__[name] = value


def as_ours(old: nn.Module, kind: Any) -> nn.Module:
    """Return one of ours with the parameters of another module."""
    given = {name: getattr(old, name) for name in _ARGUMENTS if hasattr(old, name)}
    if kind is not LSTM:
        given.pop("proj_size", None)
    dropout = given.pop("dropout", None)  # with one layer, it would warn again
    new: nn.Module = kind(**given, device="meta")
    if dropout is not None:
        new.dropout = dropout
    new._parameters.clear()
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    for name, module in old._modules.items():
        if name != "parametrizations":
            new._modules[name] = module
    # Copy weights that are plain attributes, and the user's own, but not torch.nn's caches.
    own = [n for n in old.__dict__ if n not in new.__dict__]
    new.__dict__.update({n: old.__dict__[n] for n in own if not n.startswith(_OF_TORCH)})
    parametrize.transfer_parametrizations_and_params(old, new)
    new.train(old.training)
    transfer_hooks(old, new)
    return new
