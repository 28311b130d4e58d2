"""The CUDA backend agrees with the reference in float64, in every precision and plan.

On a machine without a GPU these tests are skipped; tests/emulate.sh runs them on the kernels
compiled for the host, where blocks and threads are fibers that arrive in a random order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from cases import CASE_IDS, CASES
from gpu import (
    EMULATED,
    EXCHANGES,
    GPU,
    PRECISIONS,
    SHAPES,
    Gpu,
    assert_same_bits,
    choose_plan,
    exists,
    mode,
    put,
)
from helpers import (
    MASKS,
    Sizes,
    arguments,
    check_against_reference,
    cotangents,
    masks,
    op,
    options_of,
    present,
    with_options,
)
from hypothesis import strategies as st

import fusedrnn as fr
from fusedrnn import cuda, reference
from fusedrnn.cells import CELLS, Cell

pytestmark = GPU


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _default_plan() -> Iterator[None]:
    yield
    cuda._module().wish()


@pytest.mark.parametrize("sizes", [Sizes(5, 3, 4, 7), Sizes(3, 2, 5, 70)], ids=str)
def test_each_option(cell: Cell, precision: str, sizes: Sizes) -> None:
    """Each option alone agrees with the reference, in every precision."""
    for name in options_of(cell):
        check_against_reference(cell, sizes, Gpu(precision), [name])


@pytest.mark.parametrize(("name", "row"), CASES, ids=CASE_IDS)
def test_options_combine(name: str, row: tuple[Any, ...]) -> None:
    """Options agree with the reference in all pairs."""
    *flags, reverse, dtype, sizes, _ = row
    names = [f for f in flags if f]
    check_against_reference(CELLS[name], sizes, Gpu(dtype), names, reverse=reverse, seed=1)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_agrees_with_reference(cell: Cell, precision: str, exchange: str, sizes: Sizes) -> None:
    """Every way to exchange h between blocks agrees with the reference."""
    choose_plan(exchange=exchange)
    if not exists(cell, precision, sizes):
        pytest.skip(f"no plan with {exchange} for {sizes} fits this GPU")
    check_against_reference(cell, sizes, Gpu(precision), reverse=sizes.T % 2 == 0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_masks(cell: Cell, precision: str, kind: str, reverse: bool) -> None:
    """Lengths and resets, alone and together, agree with the reference."""
    sizes = Sizes(6, 11, 3, 20)
    check_against_reference(cell, sizes, Gpu(precision), [kind], reverse=reverse)


# Options that leave a recurrence its plan.
OF_A_UNIT = [
    "clip",
    "cell_clip",
    "peephole",
    "zoneout",
    "zoneout in inference",
    "recurrent_dropout",
    "weight_dropout",
    "return_cells",
    "trace",
    "recompute",
    "bptt",
]


@hypothesis.given(
    sizes=st.builds(
        Sizes, st.integers(1, 7), st.integers(1, 40), st.integers(1, 12), st.integers(1, 70)
    ),
    name=st.sampled_from(list(CELLS)),
    precision=st.sampled_from(PRECISIONS),
    exchange=st.sampled_from(list(EXCHANGES)),
    tiles=st.sampled_from([0, 1, 4]),
    resident=st.sampled_from([-1, 0, 1]),
    staged=st.sampled_from([-1, -1, 0, 1]),
    groups=st.sampled_from([0, 1, 2, 4]),
    splits=st.sampled_from([0, 1, 2, 4]),
    reverse=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from([None, *MASKS]),
    options=st.one_of(st.just([]), st.lists(st.sampled_from(OF_A_UNIT), unique=True)),
)
@hypothesis.settings(max_examples=300 if EMULATED else 1000, deadline=None, derandomize=True)
def test_agrees_with_reference_on_any_plan(
    sizes: Sizes,
    name: str,
    precision: str,
    reverse: bool,
    bias: bool,
    kind: Any,
    options: list[str],
    **plan: Any,
) -> None:
    """Any plan that there is agrees with the reference on any shape."""
    cell = CELLS[name]
    choose_plan(**plan)
    if not exists(cell, precision, sizes):
        return
    names = [n for n in options if n in options_of(cell)] + [kind] * (kind is not None)
    has_bias = bias or bool(options)
    check_against_reference(
        cell, sizes, Gpu(precision), names, reverse=reverse, bias=has_bias, seed=3
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_integers_are_exact(precision: str, exchange: str) -> None:
    """A linear recurrence on small integers is exact: every index and tail, without
    tolerance.
    """
    rng = np.random.default_rng(7)
    T, B, I, H = sizes = Sizes(2, 9, 3, 19)
    choose_plan(exchange=exchange)
    assert exists(CELLS["rnn_identity"], precision, sizes)
    shapes = {"x": (T, B, I), "weight_ih": (H, I), "weight_hh": (H, H)}
    shapes |= {"bias_ih": (H,), "bias_hh": (H,), "h0": (B, H)}
    values = {k: rng.integers(-1, 2, shape).astype(np.float64) for k, shape in shapes.items()}
    mask = {"lengths": rng.integers(0, T + 1, B), "resets": rng.random((T, B)) < 0.3}
    expected, _ = reference.rnn_vjp(**values, **mask, nonlinearity="identity")
    results, _ = fr.rnn_vjp(
        **put(values, precision), **mask, nonlinearity="identity", precision=mode(precision)
    )
    for a, e in zip(results, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), e)


def test_sigmoid_and_tanh_over_the_whole_range() -> None:
    """In float32 σ is within 8 ULP and tanh within 4; what would be subnormal may be 0."""
    H = 512
    weights = np.concatenate(
        [np.geomspace(1e-12, 110, H // 2), np.linspace(-110, -0.2, H // 2)]
    )
    x = np.array([1, -1, 0.9, -0.7, 0.51, -0.3, 1e-3, 3e38], np.float32)[:, None]
    off = np.zeros(2 * H, np.float32)[:, None]
    weights = weights.astype(np.float32)[:, None]
    with np.errstate(over="ignore"):
        sums = (x * weights.T).astype(np.float64)  # (B, H), rounded to float32
        sigmoid = 1 / (1 + np.exp(-sums))
    # A state of 1 becomes z where n is 0, and n where z is.
    arguments = {"x": x[None], "weight_hh": np.zeros((3 * H, H), np.float32)}
    z, _ = fr.gru(
        **{k: cuda.array(v) for k, v in arguments.items()},
        weight_ih=cuda.array(np.concatenate([off[:H], weights, off[:H]])),
        h0=cuda.array(np.ones((len(x), H), np.float32)),
    )
    n, _ = fr.rnn(
        cuda.array(x[None]), cuda.array(weights), cuda.array(np.zeros((H, H), np.float32))
    )
    assert not np.signbit(z.numpy()).any()
    for actual, expected, ulps in ((z, sigmoid, 8), (n, np.tanh(sums), 4)):
        ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
        within = np.maximum(ulps * ulp, np.finfo(np.float32).smallest_normal)
        assert (np.abs(actual.numpy()[0] - expected) <= within).all()


@pytest.mark.parametrize(
    "sizes", [Sizes(0, 3, 4, 5), Sizes(3, 0, 4, 5), Sizes(0, 0, 1, 1)], ids=str
)
def test_empty_sequences_and_batches(cell: Cell, precision: str, sizes: Sizes) -> None:
    """Sequences and batches of no length give what the reference gives."""
    check_against_reference(cell, sizes, Gpu(precision))


def test_missing_states_and_gradients_are_zeros(cell: Cell) -> None:
    """States and gradients that are None count as zeros, bit for bit."""
    values = put(arguments(cell, Sizes(5, 4, 3, 18)), "float32")
    states = {k: v for k, v in values.items() if k in ("h0", "c0")}
    on_gpu = {k: v for k, v in values.items() if k not in states}
    zeros = {k: cuda.array(np.zeros(v.shape, np.float32)) for k, v in states.items()}
    results, pullback = op(cell, "_vjp")(**on_gpu)
    same, same_pullback = op(cell, "_vjp")(**on_gpu, **zeros)
    weights = [cuda.array(w) for w in cotangents(tuple(r.numpy() for r in results))]
    partial = [weights[0], *(None for _ in weights[1:])]
    filled = [weights[0], *(cuda.array(np.zeros(w.shape, np.float32)) for w in weights[1:])]
    assert_same_bits(
        (*results, *present(pullback(*partial))), (*same, *present(same_pullback(*filled)))
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_repetitions_are_bit_identical(precision: str, exchange: str) -> None:
    """Every call gives the same bits, in whatever order blocks and threads arrive."""
    choose_plan(exchange=exchange, tiles=1)
    on_gpu = put(arguments(CELLS["lstm"], Sizes(5, 10, 4, 40)), precision)
    first = None
    for _ in range(3 if EMULATED else 1000):
        results, pullback = fr.lstm_vjp(**on_gpu, precision=mode(precision))
        bits = [a.numpy().tobytes() for a in (*results, *present(pullback(*results)))]
        first = first or bits
        assert bits == first


def test_exchanges_give_the_same_bits(precision: str) -> None:
    """All exchanges give the same bits: over more steps than a graph holds, in calls
    queued at once, with some warps without a unit.
    """
    plain = put(arguments(CELLS["gru"], Sizes(70, 3, 2, 40)), precision)
    names = ["peephole", "clip", "zoneout", "recurrent_dropout", "return_cells"]
    sizes = Sizes(70, 3, 2, 20 if precision == "float64" else 40)  # what fits the emulator
    values, options = with_options(CELLS["lstm"], sizes, names)
    values = put(values, precision)

    def run(exchange: str) -> list[Any]:
        staged = exchange == "staged grid"
        choose_plan(
            exchange="grid" if staged else exchange,
            staged=staged,
            tiles=1,
            groups=2 if precision == "float64" else 4,  # 4 do not fit the emulator
            splits=1,
            resident=0,
        )
        queued = [
            fr.gru_vjp(**plain, precision=mode(precision)),
            fr.lstm_vjp(**values, precision=mode(precision), **options),
        ]
        return [
            a for results, pullback in queued for a in (*results, *present(pullback(*results)))
        ]

    expected = run("step")
    for exchange in ("grid", "staged grid", "cluster"):
        assert_same_bits(run(exchange), expected)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_nan_is_taken_for_nothing(precision: str, exchange: str) -> None:
    """A state that is NaN with all bits set, for which blocks wait, arrives like any other."""
    choose_plan(exchange=exchange, tiles=1)
    values = arguments(CELLS["gru"], Sizes(6, 4, 2, 20))
    values["h0"][1:3] = np.uint64(2**64 - 1).view(np.float64)
    on_gpu = put(values, precision)
    if precision != "float64":
        bits = on_gpu["h0"].numpy().view(np.uint32)
        bits[1:3] = 2**32 - 1
        on_gpu["h0"] = cuda.array(bits.view(np.float32))
    (y, h_n), pullback = fr.gru_vjp(
        **on_gpu, precision=mode(precision), lengths=np.array([6, 6, 0, 2])
    )
    dx = pullback(y, h_n).x
    assert np.isnan(h_n.numpy()).any(axis=1).tolist() == [False, True, True, False]
    for a in (y, dx):
        is_nan = np.isnan(a.numpy().astype(np.float32)).any(axis=(0, 2))
        assert is_nan.tolist() == [False, True, False, False]


def test_unbatched_is_a_batch_of_one(cell: Cell) -> None:
    """A sequence without a batch gives the bits of a batch of one."""
    values = arguments(cell, Sizes(5, 1, 3, 18), np.float32)
    alone = {k: v[..., 0, :] if k in ("x", "h0", "c0") else v for k, v in values.items()}
    mask = {"lengths": 4, "resets": np.array([False, True, False, False, False])}
    many = {"lengths": np.array([4]), "resets": mask["resets"][:, None]}
    results, pullback = op(cell, "_vjp")(**put(values, "float32"), **many)
    single, single_pullback = op(cell, "_vjp")(**put(alone, "float32"), **mask)
    for a, b in zip(
        (*results, *present(pullback(*results))),
        (*single, *present(single_pullback(*single))),
        strict=True,
    ):
        np.testing.assert_array_equal(a.numpy().reshape(b.shape), b.numpy())


def test_strided_input_and_gradient(cell: Cell) -> None:
    """Rows may lie in any order and distance; only the last axis must be contiguous."""
    values = arguments(cell, Sizes(5, 4, 3, 18), np.float32)
    on_gpu = put(values, "float32")
    batch_major = cuda.array(np.concatenate([values["x"].swapaxes(0, 1)] * 2, axis=-1))
    strided = on_gpu | {"x": batch_major.swapaxes(0, 1)[..., :3]}
    results, pullback = op(cell, "_vjp")(**on_gpu)
    same, same_pullback = op(cell, "_vjp")(**strided)
    dy = np.random.default_rng(2).normal(size=(5, 4, 18)).astype(np.float32)
    sideways = cuda.array(dy.swapaxes(0, 1)).swapaxes(0, 1)
    assert_same_bits(
        (*results, *present(pullback(cuda.array(dy)))),
        (*same, *present(same_pullback(sideways))),
    )


def test_masks_may_be_on_the_gpu() -> None:
    """Lengths and resets on the GPU give the bits of those on the host."""
    sizes = Sizes(6, 5, 3, 8)
    on_gpu = put(arguments(CELLS["gru"], sizes), "float32")
    both = masks("both", sizes)
    y, _ = fr.gru(**on_gpu, **both)
    for dtype in ("int32", "int64"):
        lengths = cuda._upload(both["lengths"].astype(dtype), dtype, 0, 0)
        resets = cuda._upload(both["resets"], "bool", 0, 0)
        same, _ = fr.gru(**on_gpu, lengths=lengths, resets=resets)
        np.testing.assert_array_equal(y.numpy(), same.numpy())


def test_full_lengths_change_no_bit(cell: Cell, precision: str) -> None:
    sizes = Sizes(9, 5, 7, 33)
    values = put(arguments(cell, sizes), precision)
    plain = op(cell)(**values)
    assert_same_bits(op(cell)(**values, lengths=np.full(sizes.B, sizes.T)), plain)


def test_every_plan_can_be_chosen_and_is_timed() -> None:
    """Each plan can be chosen alone, its time estimated, and the recurrence timed."""
    module = cuda._module()
    sizes = Sizes(3, 9, 4, 40)
    kernel = module.Kernel("gru", "bfloat16", 0, 0)
    plans = kernel.plans(*sizes, False)
    values = put(arguments(CELLS["gru"], sizes), "bfloat16")
    chosen = ("exchange", "tiles", "resident", "on_chip", "staged", "groups", "splits")
    assert len({tuple(plan[k] for k in chosen) for plan in plans}) == len(plans) > 20
    for plan in plans[::10]:
        module.wish(**{k: plan[k] for k in chosen})
        assert kernel.plans(*sizes, False) == [plan]
        seconds = module.time_recurrences(lambda: fr.gru(**values))
        assert len(seconds) == 1
        assert seconds[0] > 0
    module.wish()
    usual = module.estimates(plans, {})
    best = plans[int(np.argmin(usual))]
    assert cuda.explain("gru", *sizes, "bfloat16")["rows"] == 8 * best["tiles"]
    assert min(usual) > 0
    dear = module.estimates(plans, {"grid_meets": 1e9})
    for plan, before, after in zip(plans, usual, dear, strict=True):
        assert (after > before) == (plan["exchange"] == EXCHANGES["grid"])


FAULTY = """
import numpy as np, fusedrnn as fr
from fusedrnn import cuda
cuda._module().wish(exchange={exchange})
rng = np.random.default_rng(0)
shapes = (9, 20, 3), (160, 3), (160, 40)
x, *weights = (cuda.array(rng.normal(size=shape), "float32") for shape in shapes)
for _ in range(2):
    try:
        fr.lstm(x, *weights)
    except RuntimeError as failure:
        print(failure)
"""


@pytest.mark.parametrize("exchange", ["cluster", "grid"])
def test_what_never_arrives_ends_a_call(exchange: str) -> None:
    """A call whose blocks wait in vain fails, and so does every later one of the process."""
    if not EMULATED:
        pytest.skip("this fault can only be made on the emulator")
    done = subprocess.run(
        [sys.executable, "-c", FAULTY.format(exchange=EXCHANGES[exchange])],
        env=os.environ | {"EMULATOR_LOSES_STORE": "501"},
        capture_output=True,
        text=True,
        check=True,
    )
    lost = "the context is lost: every thread waits for memory that nobody writes"
    assert done.stdout.splitlines() == [lost] * 2


def test_a_lost_gpu_costs_one_test(tmp_path: Path) -> None:
    """The tests after one that lost the GPU run in another process."""
    if not EMULATED:
        pytest.skip("this fault can only be made on the emulator")
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_some.py").write_text(
        """
import numpy as np, os, pytest, fusedrnn as fr
from fusedrnn import cuda
@pytest.mark.gpu
@pytest.mark.parametrize("n", range(4))
def test_one(n):
    if n == 1:
        os.environ["EMULATOR_LOSES_STORE"] = "10"
    cuda._module().wish(exchange=1)
    x, *weights = (cuda.array(np.ones(s), "float32") for s in ((9, 20, 3), (160, 3), (160, 40)))
    fr.lstm(x, *weights)
"""
    )
    for parallel, counts in (
        (["-n1"], "2 failed, 3 passed"),
        (["-pno:xdist"], "1 failed, 1 passed"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider", *parallel, tmp_path],
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert counts in done.stdout
