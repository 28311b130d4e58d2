"""Our modules in the place of those that a model has."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from .modules import GRU, LSTM, RNN
from .steps import GRUCell, LSTMCell, RNNCell

_OURS: dict[type[nn.Module], Any] = {
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
    """What `swap` did; prints as text.

    Attributes
    ----------
    replaced: the modules that took the place of others, by their names in the model.
    kept: why a recurrent module of torch.nn was left as it is, by its name.
    """

    replaced: dict[str, nn.Module]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{name}: {type(module).__name__}({module.extra_repr()})"
            for name, module in self.replaced.items()
        ]
        lines += [f"{name}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "no recurrent module of torch.nn"


def swap(model: nn.Module) -> Swapped:
    """Put ours in the place of every nn.LSTM, nn.GRU, nn.RNN and their cells in a model.

    Parameters are shared, not copied, so that optimizers made before go on to work; hooks,
    parametrizations and the mode (training or not) move, too. A module used twice is replaced
    by one.

    Parameters
    ----------
    model: a module that contains others; it is changed in place.

    Returns
    -------
    What was replaced and what was not; print it.

    Raises
    ------
    TypeError: model is no module, or itself one to be replaced, which cannot be done in place.

    >>> import torch, fusedrnn.torch as ft
    >>> from torch import nn
    >>> model = nn.ModuleDict({"encoder": nn.GRU(3, 4), "head": nn.Linear(4, 1)})
    >>> print(ft.swap(model))
    encoder: GRU(3, 4)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if _kind(model) is not None:
        raise TypeError(
            f"model must contain the modules to replace, got {model} itself: build "
            f"fusedrnn.torch.{_kind(model).__name__} and load its state_dict"
        )
    done = Swapped({}, {})
    made: dict[nn.Module, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            path = f"{parent_name}.{name}" if parent_name else name
            kind = None if child is None else _kind(child)
            if child is None or kind is None:
                if isinstance(child, tuple(_OURS)):
                    done.kept[path] = f"{type(child).__name__} is a class of its own"
                continue
            if child not in made:
                made[child] = _replacement(child, kind)
            setattr(parent, name, made[child])
            done.replaced[path] = made[child]
    return done


def _kind(module: nn.Module) -> Any:
    """Return which of ours replaces a module, None for none."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    return _OURS.get(kind)


def _replacement(old: nn.Module, kind: Any) -> nn.Module:
    """Return one of ours with the parameters of another module."""
    given = {name: getattr(old, name) for name in _ARGUMENTS if hasattr(old, name)}
    if kind is not LSTM:
        given.pop("proj_size", None)
    dropout = given.pop("dropout", None)  # that of one layer would warn again
    new: nn.Module = kind(**given, device="meta")
    if dropout is not None:
        new.dropout = dropout
    new._parameters.clear()
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    for name, module in old._modules.items():
        if name != "parametrizations":
            new._modules[name] = module
    # Weights that are attributes, and what a user put there, not what torch.nn keeps.
    own = [n for n in old.__dict__ if n not in new.__dict__]
    new.__dict__.update({n: old.__dict__[n] for n in own if not n.startswith(_OF_TORCH)})
    parametrize.transfer_parametrizations_and_params(old, new)
    new.train(old.training)
    for name, value in old.__dict__.items():
        if name.endswith(("_hooks", "_hook")) or "_hooks_" in name:
            new.__dict__[name] = value
    return new
