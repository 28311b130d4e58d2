"""Gives damaged files to everything that reads one, guided by coverage.

pip install atheris                                   a fuzzer for CPython 3.11 to 3.13 on Linux
python tests/fuzz_files.py stream --seconds 600       Stream.load
python tests/fuzz_files.py onnx --seconds 600         fusedrnn.onnx.layers
python tests/fuzz_files.py convert --seconds 600      fusedrnn convert
python tests/fuzz_files.py compare --seconds 600      fusedrnn bench --compare
python tests/fuzz_files.py onnx --seed 3 --blind      random damage, without atheris

A file is either read or refused by one error, ValueError or that of the command, and what would
have changed stays. Any other error, 20 s for one file, and 2 GB of memory are failures. atheris
writes the file that failed and its repetition: python tests/fuzz_files.py stream FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Functions import what reads files, so that atheris can watch it.
INTEGERS = (0, 1, -1, 2, 7, 14, 100, 2**31, 2**40, 2**62, -(2**40))


# Damage


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Change, cut, repeat or insert some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[at : at + rng.randint(1, 20)]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            begin = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[begin : begin + rng.randint(1, 60)]
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def damaged_model(rng: random.Random, data: bytes) -> bytes:
    """Change some fields of a model of ONNX, or some of its bytes."""
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception:
        return damaged(rng, data)
    if rng.random() < 0.2:
        return damaged(rng, data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        fields: list[tuple[Any, Any]] = []
        collect(model, fields)
        if not fields:
            break
        message, field = rng.choice(fields)
        with contextlib.suppress(ValueError, TypeError, IndexError):  # no such value
            change(rng, message, field)
    written: bytes = model.SerializeToString()
    return written


def collect(message: Any, fields: list[tuple[Any, Any]]) -> None:
    """Append every field that is present, with its message."""
    for field, value in message.ListFields():
        fields.append((message, field))
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                collect(inner, fields)


def change(rng: random.Random, message: Any, field: Any) -> None:
    """Drop, repeat, empty or replace a field of a message of protobuf."""
    value = getattr(message, field.name)
    if field.message_type is not None and not field.is_repeated:
        message.ClearField(field.name)
    elif field.message_type is not None:
        kind = rng.randrange(3)
        if kind == 0:
            del value[rng.randrange(len(value))]
        elif kind == 1:
            value.add().CopyFrom(rng.choice(value))
        else:
            value[rng.randrange(len(value))].Clear()
    elif field.cpp_type == field.CPPTYPE_STRING:
        texts = ["", "x", "LSTM", "GRU", "Concat", "Gather", "If", "layout", "reverse", "W"]
        text: Any = rng.choice(texts)
        text = text.encode() if field.type == field.TYPE_BYTES else text
        replace(rng, message, field, text)
    elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        replace(rng, message, field, rng.choice([0.0, 1e38, -1.0, float("nan")]))
    else:
        replace(rng, message, field, rng.choice([*INTEGERS, rng.randrange(30)]))


def replace(rng: random.Random, message: Any, field: Any, value: Any) -> None:
    if not field.is_repeated:
        setattr(message, field.name, value)
        return
    values = getattr(message, field.name)
    at = rng.randrange(len(values))
    if rng.random() < 0.3:
        del values[at]
    else:
        values[at] = value


# Readers: good files, and a function that fails if damage is not refused.


@functools.cache
def a_stream() -> Any:
    import numpy as np

    import fusedrnn as fr

    stream = fr.Stream(fr.LSTM(3, 4, rng=0), 2)
    stream.step(np.ones((2, 3), np.float32))
    return stream


def good_states() -> list[bytes]:
    import zipfile

    import numpy as np

    file = io.BytesIO()
    a_stream().save(file)
    found = [file.getvalue()]
    h, c = a_stream().state
    for wrong in (h, h[0], h.astype("float64"), h.astype(">f4"), np.asfortranarray(h)):
        file = io.BytesIO()
        np.savez_compressed(file, h=wrong, c=c)
        found.append(file.getvalue())
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        source = zipfile.ZipFile(io.BytesIO(found[0]))
        with zipfile.ZipFile(file, "w", method) as archive:
            for name in source.namelist():
                archive.writestr(name, source.read(name))
        found.append(file.getvalue())
    return found


def read_state(data: bytes) -> None:
    stream = a_stream()
    before = stream.state
    try:
        stream.load(io.BytesIO(data))
    except ValueError as error:
        check(str(error), "file")
        after = stream.state
        if any((a != b).any() for a, b in zip(after, before, strict=True)):
            raise AssertionError("the state changed") from None
    stream.state = before


@functools.cache
def good_models() -> list[bytes]:
    import fusedrnn as fr
    from fusedrnn.onnx import export

    layers = [
        fr.LSTM(3, 4, 2, bidirectional=True, peephole=True, clip=0.5, activation="softsign"),
        fr.GRU(2, 3, reset_after=False, rng=0),
        fr.RNN(2, 3, nonlinearity="relu", reverse=True, batch_first=True),
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for layer in layers:
            path = Path(folder) / "model.onnx"
            export(layer, path, lengths=True)
            found.append(path.read_bytes())
    return found


def read_model(data: bytes) -> None:
    from fusedrnn import onnx

    try:
        found = onnx.layers(data)
    except ValueError as error:
        check(str(error), "model")
    else:
        str(found)


@functools.cache
def a_path() -> Path:
    return Path(tempfile.mkdtemp()) / "file"


def convert_model(data: bytes) -> None:
    from fusedrnn.files import UserError
    from fusedrnn.onnx.report import report

    a_path().write_bytes(data)
    try:
        report(a_path())
    except UserError as error:
        check(str(error), str(a_path()))


def a_run() -> dict[str, Any]:
    times = [0.002, 0.001, 0.003]
    results = [
        {"case": "LSTM inference", "sizes": [9, 1, 3, 4], "seconds": {"ours": times}},
        {"case": "GRU training", "sizes": [2, 3], "seconds": {"ours": times, "torch": times}},
    ]
    ratios: list[dict[str, Any]] = [{}, {"torch": [1.5, 1.2, 2.0]}]
    return {
        "format": 1,
        "cases": [a | {"ratios": b} for a, b in zip(results, ratios, strict=True)],
    }


def good_runs() -> list[bytes]:
    import json

    deep = b'{"format": 1, "cases": ' + b"[" * 500 + b"]" * 500 + b"}"
    return [json.dumps(a_run()).encode(), json.dumps(a_run(), indent=1).encode(), deep]


def read_run(data: bytes) -> None:
    from fusedrnn.bench import command
    from fusedrnn.files import UserError

    a_path().write_bytes(data)
    try:
        earlier = command._earlier(a_path())
    except UserError as error:
        check(str(error), "--compare")
    else:
        command.comparison(earlier["cases"], a_run()["cases"])


def check(text: str, name: str) -> None:
    if name not in text:
        raise AssertionError(f"{name} is not named: {text}") from None


class Target(NamedTuple):
    """Good files, a function that reads one, and one that damages it."""

    good: Callable[[], list[bytes]]
    read: Callable[[bytes], None]
    damage: Callable[[random.Random, bytes], bytes] = damaged


TARGETS = {
    "stream": Target(good_states, read_state),
    "onnx": Target(good_models, read_model, damaged_model),
    "convert": Target(good_models, convert_model, damaged_model),
    "compare": Target(good_runs, read_run),
}


def read_damaged(target: Target, seed: int, number: int) -> bytes:
    """Damage a good file at random and read it; return the bytes."""
    rng = random.Random(f"{seed}:{number}")
    data = target.damage(rng, rng.choice(target.good()))
    target.read(data)
    return data


def blindly(target: Target, seed: int, seconds: float) -> int:
    """Damage good files at random for some time."""
    begin, number = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        try:
            read_damaged(target, seed, number)
        except Exception:
            print(f"FAILURE: number {number} of seed {seed}")
            raise
        number += 1
    print(f"{number} files, 0 failures ({seconds:g} s)")
    return 0


def guided(name: str, seconds: float, file: str | None) -> None:
    """Let atheris search for files that reach new code, for some time, or read one file."""
    import atheris

    include = ["fusedrnn", "zipfile", "numpy.lib", "onnx", "json"]
    with atheris.instrument_imports(include=include):
        import zipfile  # noqa: F401

        import fusedrnn.bench.command
        import fusedrnn.onnx.report  # noqa: F401

    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp())
    for n, data in enumerate(target.good()):
        (folder / f"{n}").write_bytes(data)
        target.read(data)  # imports what it needs, which takes longer than a file may

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(data, most))
        return target.damage(rng, data)[:most]

    limits = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=20000", "-print_final_stats=1"]
    places = [file] if file else [f"-max_total_time={seconds:.0f}", str(folder)]
    atheris.Setup([sys.argv[0], *limits, *places], target.read, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("file", nargs="?", help="read this file alone")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of blind damage")
    parser.add_argument("--blind", action="store_true", help="without atheris")
    options = parser.parse_args()
    if options.blind:
        return blindly(TARGETS[options.target], options.seed, options.seconds)
    guided(options.target, options.seconds, options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
