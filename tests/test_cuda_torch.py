"""The CUDA backend under PyTorch: its tensors, operators on the emulator, graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu import (
    EMULATED,
    GPU,
    put,
)
from helpers import (
    Sizes,
    arguments,
    assert_close,
    present,
)

import fusedrnn as fr
from fusedrnn import cuda, reference
from fusedrnn.cells import CELLS

pytestmark = GPU


@pytest.fixture(autouse=True)
def _default_plan() -> Iterator[None]:
    yield
    cuda._module().wish()


class HostTorch:
    """PyTorch on the emulator, whose memory is the host's."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.cuda = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.torch, name)

    def current_stream(self, device: int) -> Any:
        return type("Stream", (), {"cuda_stream": 0})

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        assert device == "cuda:0"
        return self.torch.empty(shape, dtype=dtype)


@pytest.mark.skipif(not EMULATED, reason="a real GPU has test_torch_tensors")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_torch_tensors_on_the_emulator(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of PyTorch give the bits of our arrays."""
    torch = pytest.importorskip("torch")
    plain = cuda.framework_of
    framework = cuda._Torch(HostTorch(torch))
    monkeypatch.setattr(
        cuda, "framework_of", lambda a: framework if isinstance(a, torch.Tensor) else plain(a)
    )
    values = put(arguments(CELLS["lstm"], Sizes(5, 4, 3, 6)), dtype)
    tensors = {
        k: torch.tensor(v.numpy()).to(getattr(torch, v.dtype)) for k, v in values.items()
    }
    results, pullback = fr.lstm_vjp(**values)
    same, same_pullback = fr.lstm_vjp(**tensors)
    gradients, same_gradients = present(pullback(*results)), present(same_pullback(*same))
    for a, b in zip((*results, *gradients), (*same, *same_gradients), strict=True):
        assert isinstance(b, torch.Tensor)
        np.testing.assert_array_equal(a.numpy(), b.to(torch.float64).numpy())


TORCH_OPTIONS = [
    ("lstm", ["mask last", "return_cells", "trace", "peephole", "recompute"]),
    ("gru", ["mask", "resets", "reverse"]),
    ("lstm", []),
    ("gru", ["lengths", "reverse"]),
    ("rnn_relu", ["resets", "bptt"]),
    ("rnn_tanh", ["zoneout in inference"]),
    ("lstm", ["zoneout", "recurrent_dropout", "weight_dropout", "peephole", "trace"]),
    ("lstm_coupled", ["clip", "recompute", "both"]),
    ("lstm", ["return_cells", "recompute"]),
    ("lstm", ["projection", "layer_norm", "cell_clip"]),
    ("gru_before", ["layer_norm", "zoneout", "lengths"]),
]


@pytest.mark.skipif(not EMULATED, reason="a real GPU runs PyTorch's own tests")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize(("name", "options"), TORCH_OPTIONS, ids=str)
def test_torch_operators_on_the_emulator(
    name: str, options: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's results have the form that its fake says, and agree with the definition."""
    torch = pytest.importorskip("torch")
    from torch_calls import call_of

    from fusedrnn.torch import kernels, ops
    from fusedrnn.torch.call import Inputs

    plain, framework = cuda.framework_of, cuda._Torch(HostTorch(torch))
    monkeypatch.setattr(
        cuda, "framework_of", lambda a: framework if isinstance(a, torch.Tensor) else plain(a)
    )
    monkeypatch.setattr(Inputs, "is_on_gpu", property(lambda _: True))
    kernels._saved_bytes.cache_clear()
    call, exact = call_of(CELLS[name], options)
    kind = getattr(torch, dtype)
    wide = torch.float64 if dtype == "float64" else torch.float32

    def as_kind(a: Any, to: Any) -> Any:
        return a if a is None or not a.is_floating_point() else a.detach().to(to)

    inputs = Inputs(
        as_kind(exact.x, kind),
        as_kind(exact.h0, wide),
        as_kind(exact.c0, wide),
        [as_kind(p, kind) for p in exact.parameters],
        *exact[4:],
    )
    actual = kernels.compute_forward(call, *inputs)
    fake = ops._fake_forward(*call.text, *inputs)
    form = [(tuple(a.shape), a.dtype) for a in fake]
    assert [(tuple(a.shape), a.dtype) for a in actual] == form
    leaves = [a if a is None else a.double().requires_grad_() for a in inputs.smooth]
    expected = ops.define(call, *leaves[:3], leaves[3:], *inputs[4:])
    outputs = list(zip(actual[:4], expected[:4], call.has_results, strict=True))
    pairs = [(a, e) for a, e, here in outputs if here]
    for a, e in pairs:
        assert_close(a, e, f"{dtype} on GPU")
    torch.manual_seed(0)
    d = [torch.randn_like(a) if here else None for a, _, here in outputs]
    smooth = [n for n, a in enumerate(leaves) if a is not None]
    for wanted_of in (smooth, smooth[-1:], smooth[:1], smooth[1:-1]):
        wanted = [n in wanted_of for n in range(len(leaves))]
        read = (*d, actual[0], actual[3], actual[5], *inputs)
        gradients = kernels.compute_backward(call, wanted, *read)
        fakes = ops._fake_backward(*call.text, wanted, *read)
        forms = [(tuple(a.shape), a.dtype) for a in fakes]
        assert [(tuple(a.shape), a.dtype) for a in gradients] == forms
        right = torch.autograd.grad(
            [e for _, e in pairs],
            [leaves[n] for n in wanted_of],
            [g.double() for g in d if g is not None],
            retain_graph=True,
        )
        for n, a, e in zip(wanted_of, gradients, right, strict=True):
            assert_close(a, e, f"{dtype} on GPU", str(n), gradient=True, factor=3)


# With PyTorch, on a real GPU


def torch_cuda() -> Any:
    torch = pytest.importorskip("torch")
    if EMULATED or not torch.cuda.is_available():
        pytest.skip("PyTorch has no GPU here")
    return torch


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_torch_tensors(dtype: str) -> None:
    """Ops take tensors of PyTorch on a stream of its own and agree with the reference."""
    torch = torch_cuda()
    values = arguments(CELLS["lstm"], Sizes(9, 5, 7, 33))
    state = torch.float64 if dtype == "float64" else torch.float32
    tensors = {
        k: torch.tensor(
            v, device="cuda", dtype=state if k[1:] == "0" else getattr(torch, dtype)
        )
        for k, v in values.items()
    }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results, pullback = fr.lstm_vjp(**tensors)
        gradients = present(pullback(*results))
    stream.synchronize()
    assert all(isinstance(a, torch.Tensor) and a.is_cuda for a in (*results, *gradients))
    expected = reference.lstm(**{k: v.double().cpu().numpy() for k, v in tensors.items()})
    for a, e in zip(results, expected, strict=True):
        assert_close(a, e, f"{dtype} on GPU")


def test_cuda_graph() -> None:
    """A captured training step, replayed, gives the bits of one that ran."""
    torch = torch_cuda()
    values = arguments(CELLS["gru"], Sizes(9, 5, 7, 33), np.float32)
    tensors = {k: torch.tensor(v, device="cuda") for k, v in values.items()}

    def train() -> Any:
        results, pullback = fr.gru_vjp(**tensors)
        return (*results, *present(pullback(*results)))

    expected = [a.clone() for a in train()]
    train()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    for a in captured:
        a.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)


LAYERS = {
    "lstm": lambda: fr.LSTM(
        4,
        9,
        num_layers=2,
        dropout=0.4,
        bidirectional=True,
        proj_size=5,
        peephole=True,
        layer_norm=True,
        zoneout=(0.1, 0.3),
        recurrent_dropout=0.2,
        weight_dropout=0.2,
        dtype=np.float64,
        rng=1,
    ),
    "coupled": lambda: fr.LSTM(
        4,
        9,
        coupled_gates=True,
        peephole=True,
        clip=1.0,
        cell_clip=0.7,
        dtype=np.float64,
        rng=1,
    ),
    "gru": lambda: fr.GRU(
        4,
        9,
        num_layers=2,
        dropout=0.3,
        reset_after=False,
        layer_norm=True,
        zoneout=0.2,
        dtype=np.float64,
        rng=1,
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_with_options_is_the_same_on_both(kind: str) -> None:
    """On the GPU and the CPU the same seed gives the same masks, and all else agrees to
    rounding.
    """
    layer = LAYERS[kind]()
    there = copy.deepcopy(layer).to("cuda")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3, 4))
    options: dict[str, Any] = {"lengths": [6, 0, 4], "seed": 9, "trace": True, "bptt": 2}
    has_c = kind != "gru"
    if has_c:
        options["return_cells"] = True
    (y, _, *more), pullback = layer.vjp(x, **options)
    (y_there, _, *more_there), pullback_there = there.vjp(cuda.array(x), **options)
    assert_close(y_there, y, "float64 on both")
    assert list(more[-1]) == list(more_there[-1])
    for name, gate in more[-1].items():
        assert_close(more_there[-1][name], gate, "float64 on both", name)
    d = {"dy": rng.normal(size=y.shape)}
    if has_c:
        d["d_cells"] = rng.normal(size=more[0].shape)
    expected = pullback(**d)
    gradients = pullback_there(**{k: cuda.array(v) for k, v in d.items()})
    assert_close(gradients.x, expected.x, "float64 on both", "dx", gradient=True)
    assert list(gradients.parameters) == list(expected.parameters)
    for name, e in expected.parameters.items():
        assert_close(gradients.parameters[name], e, "float64 on both", name, gradient=True)
