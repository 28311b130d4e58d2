"""Making a module that takes the place of another one."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

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
# Attributes that a module computes from others.
CACHES = ("_plain", "_saving")


def changed_by_others(module: nn.Module) -> str | None:
    """Return why another module cannot take the place of one that other code has changed."""
    if "forward" in module.__dict__:
        return "its attribute forward was set by other code"
    if "_compiled_call_impl" in module.__dict__:
        return "it was compiled by its method compile(): compile it afterwards"
    if any(hasattr(p, "to_local") for p in module.parameters(recurse=False)):
        return "its parameters are sharded: change the model before fully_shard"
    return None


def converted(old: Any, kind: Any) -> nn.Module | str:
    """Return a module of another class with the parameters and everything else of a module.

    `kind` is a class of torch.nn for a module of ours, or of ours for a module of torch.nn.
    Returns the reason if that is not possible.
    """
    why = changed_by_others(old)
    if why is not None:
        return why
    modes = {n: m.training for n, m in old.named_modules(remove_duplicate=False)}
    given = {name: getattr(old, name) for name in _ARGUMENTS if hasattr(old, name)}
    if not given.get("proj_size"):  # only an LSTM takes it
        given.pop("proj_size", None)
    dropout = given.pop("dropout", None)  # with one layer, it would warn again
    new: nn.Module = kind(**given, device="meta")
    if dropout is not None:
        new.dropout = dropout
    new._parameters.clear()
    new._parameters.update(old._parameters)
    transfer_own(old, new)
    # Copy weights that are plain attributes, and the user's own.
    of_class = parametrize.type_before_parametrizations(old)(**given, device="meta").__dict__
    own = {n: v for n, v in old.__dict__.items() if n not in of_class and n not in CACHES}
    new.__dict__.update(own)
    parametrize.transfer_parametrizations_and_params(old, new)
    transfer_hooks(old, new)
    for name, module in new.named_modules(remove_duplicate=False):
        module.training = modes[name]
    if isinstance(new, nn.RNNBase):
        new._init_flat_weights()  # torch.nn's calls read this list of the parameters
    return new


def transfer_own(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the buffers and modules of another one, except parametrizations."""
    new._buffers.update(old._buffers)
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)
    own = {name: m for name, m in old._modules.items() if name != "parametrizations"}
    new._modules.update(own)


def transfer_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the hooks of another one."""
    for name, value in old.__dict__.items():
        if name.endswith(("_hooks", "_hook")) or "_hooks_" in name:
            new.__dict__[name] = value
    hooks: Any = new._load_state_dict_pre_hooks
    for hook in hooks.values():
        if hook.with_module:  # the module that the hook is called with
            hook.module = weakref.ref(new)
