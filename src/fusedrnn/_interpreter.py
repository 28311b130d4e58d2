"""Refuses to be imported in a subinterpreter, where an import of the kernels may never end."""

from importlib import import_module

for _name in ("_interpreters", "_xxsubinterpreters"):  # since Python 3.13, and before
    try:
        _interpreters = import_module(_name)
    except ImportError:
        continue
    if _interpreters.get_current() != _interpreters.get_main():
        raise ImportError(
            "fusedrnn must be imported in the main interpreter of a process, got a "
            "subinterpreter, which NumPy does not support; use threads or processes instead"
        )
    break
