"""Files of models with our modules: what a process needs to load them."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_close

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")

from test_torch_swapping import _quiet, first, inputs  # noqa: E402, F401
from torch import nn  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402

# Files


def in_new_process(code: str, folder: Path) -> str:
    """Run code in a process that has not imported this package; return what it prints."""
    start = "import sys, torch\nx, y = torch.load('call.pt')\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def saved_call(model: Any, folder: Path) -> Any:
    """Write x and y of a call, and return x."""
    x = inputs("LSTM")
    torch.save((x, first(model(x)).detach()), folder / "call.pt")
    return x


def test_a_saved_model_loads_swapped(tmp_path: Path) -> None:
    """A whole swapped model loads with our modules in a process that did not import them, and
    with weights_only if they are named; its state loads into either kind of module.
    """
    model = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
    ft.swap(model)
    saved_call(nn.Sequential(model[0]), tmp_path)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    code = """
    model = torch.load("model.pt", weights_only=False)
    assert torch.equal(model[0](x)[0], y)
    print(type(model[0]))
    """
    assert in_new_process(code, tmp_path) == "<class 'fusedrnn.torch.modules.LSTM'>"
    with pytest.raises(pickle.UnpicklingError, match=r"Weights only load failed"):
        torch.load(tmp_path / "model.pt", weights_only=True)
    with torch.serialization.safe_globals([nn.Sequential, nn.Identity, ft.LSTM]):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert type(loaded[0]) is ft.LSTM
    x, y = torch.load(tmp_path / "call.pt")
    assert torch.equal(loaded[0](x)[0], y)
    for home in (nn, ft):
        other = home.LSTM(3, 4)
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        nn.Sequential(other).load_state_dict(state)
        assert_close(other(x)[0], y, "float32")


def test_a_restored_model_needs_nothing_of_ours(tmp_path: Path) -> None:
    """A model saved after restore loads where this package cannot be imported."""
    model = nn.Sequential(ft.LSTM(3, 4))
    model[0].tag = "mine"
    saved_call(model, tmp_path)
    ft.restore(model)
    torch.save(model, tmp_path / "model.pt")
    code = """
    sys.modules["fusedrnn"] = None
    model = torch.load("model.pt", weights_only=False)
    torch.testing.assert_close(model(x)[0], y)
    print(type(model[0]))
    """
    assert in_new_process(code, tmp_path) == "<class 'torch.nn.modules.rnn.LSTM'>"


@pytest.mark.usefixtures("_quiet")
def test_saved_programs_need_the_import(tmp_path: Path) -> None:
    """A program of torch.export or torch.jit.trace runs in a process that imports
    fusedrnn.torch; without it PyTorch's error names our operator.
    """
    model = nn.Sequential(ft.LSTM(3, 4)).eval()
    x = saved_call(model, tmp_path)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
        torch.jit.trace(model, x, check_trace=False).save(tmp_path / "traced.pt")
    loads = ['torch.export.load("program.pt2").module()', 'torch.jit.load("traced.pt")']
    for load in loads:
        code = f"""
        try:
            {load}
        except Exception as error:
            print(type(error).__name__)
        import fusedrnn.torch
        assert torch.equal({load}(x)[0], y)
        """
        raised = in_new_process(code, tmp_path)
        assert raised in ("RuntimeError", "SerializeError")  # the latter of PyTorch 2.6


@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
def test_aotinductor_packages_need_the_import(tmp_path: Path) -> None:
    """A package of AOTInductor runs in a Python process that imports fusedrnn.torch; without
    it PyTorch's error names our operator.
    """
    model = nn.Sequential(ft.LSTM(3, 4)).eval()
    x = saved_call(model, tmp_path)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    code = """
    import fusedrnn.torch
    program = torch.export.load("program.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path="package.pt2")
    """
    in_new_process(code, tmp_path)
    code = """
    try:
        torch._inductor.aoti_load_package("package.pt2")(x)
    except RuntimeError as error:
        print("fusedrnn::forward" in str(error))
    import fusedrnn.torch
    assert torch.equal(torch._inductor.aoti_load_package("package.pt2")(x)[0], y)
    """
    assert in_new_process(code, tmp_path) == "True"
