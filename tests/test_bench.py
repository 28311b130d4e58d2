"""`fusedrnn bench`: it measures, shows, keeps, compares, and refuses what it cannot do."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import cli
from fusedrnn.bench import cases, contenders, forms, properties, race, tables, worker

pytest.importorskip("rich", reason="the command shows its tables with rich")
pytest.importorskip("matplotlib", reason="the page has plots of matplotlib's")

SMALL = ["bench", "--shapes", "3,2,4,8", "--threads", "1", "--seconds", "0.01"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_name_each_case_once(device: str) -> None:
    suites = cases.GPU_SUITES if device == "cuda" else cases.SUITES
    for suite in suites.values():
        found = cases.cases_of(suite, tuple(cases.GATES), device=device)
        assert len(set(map(str, found))) == len(found)
        modes = {"inference", "streaming" if any(suite.weights) else "training"}
        assert {case.mode for case in found} >= modes


def test_forms_run_in_the_modes_and_cells_that_have_them() -> None:
    suite = cases.SUITES["options"]
    found = cases.cases_of(suite, tuple(cases.GATES), forms=["peephole", "recompute"])
    assert {(case.cell, case.form) for case in found} == {
        ("LSTM", "peephole"),
        ("LSTM", "recompute"),
        ("GRU", "recompute"),
    }
    assert {case.mode for case in found if case.form == "recompute"} == {"training"}
    shapes = {"small": (5, 3, 4, 6)}
    plain = cases.cases_of(cases.SUITES["shapes"], ["GRU"], ["training"], shapes=shapes)
    assert [str(case) for case in plain] == [f"GRU-small-training-{n}" for n in (1, 2)]


def test_work_counts_every_layer_direction_and_taken_step() -> None:
    def flops(form: str) -> int:
        return cases.Case("GRU", "", (10, 4, 6, 6), "inference", form=form).flops

    assert flops("two-layers") == 2 * flops("")
    assert flops("both-directions") == 2 * flops("")
    assert flops("lengths") < flops("")


def test_more_threads_are_tried_one_after_the_other() -> None:
    assert cases.counts_up_to(1) == [1]
    assert cases.counts_up_to(6) == [1, 2, 4, 6]
    found = cases.cases_of(cases.SUITES["quick"], ["GRU"], ["inference"], threads=[4])
    assert {case.threads for case in found if case.shape == "width-256"} == {1, 2, 4}


def _contenders(case: cases.Case) -> list[str]:
    """All that are installed, but PyTorch's slow compiler only for one case."""
    names = [name for name in contenders.CONTENDERS if not contenders.missing(name)]
    return [
        n for n in names[1:] if n != "compiled" or str(case) == "GRU-torch-small-training-1"
    ]


def _structures() -> list[cases.Case]:
    """A small case of each cell, mode, dtype, structure and interface that exists."""
    found = []
    for cell, form in itertools.product(cases.GATES, ("", *forms.STRUCTURES)):
        interfaces = ("torch",) if form == "cell" else ("numpy", "torch")
        modes = cases.MODES if not form else forms.FORMS[form].modes
        for mode, interface in itertools.product(modes, interfaces):
            for dtype in race.LIMITS if not form else ("float32",):
                steps = 1 if mode == "streaming" or form == "cell" else 5
                sizes = (steps, 3, 4, 6)
                found.append(
                    cases.Case(cell, "small", sizes, mode, 1, dtype, "cpu", form, interface)
                )
    return found


@pytest.mark.parametrize("case", _structures(), ids=str)
def test_every_contender_computes_the_same(case: cases.Case) -> None:
    if case.interface == "torch":
        pytest.importorskip("torch", reason="the case is one of PyTorch's modules")
    result = race.measure(case, [n for n in _contenders(case) if n != "plain"], 0.0)
    assert result["wrong"] == {}
    assert set(result["seconds"]) >= {"ours", "reference"}
    has_model = case.mode != "training" and case.dtype == "float32"
    assert ("onnxruntime" in result["seconds"]) <= has_model
    fr.set_num_threads(0)


@pytest.mark.parametrize("form", forms.OPTIONS)
def test_what_an_option_costs_is_timed_against_the_plain_layer(form: str) -> None:
    option = forms.FORMS[form]
    results = [
        race.measure(
            cases.Case(option.cells[0], "small", (5, 3, 4, 6), mode, form=form), ["plain"], 0.0
        )
        for mode in option.modes
    ]
    [table] = tables.tables(results)
    assert table.rows[0][0] == form
    assert len(table.rows[0]) == 1 + len(option.modes)
    fr.set_num_threads(0)


def test_a_run_is_shown_kept_and_compared(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"run.{name}" for name in ("json", "html", "md")}
    shapes = ["--shapes", "3,2,4,4", "3,2,8,8", "3,2,16,16", "--cells", "LSTM", "RNN"]
    arguments = ["bench", *shapes, "--threads", "1", "--seconds", "0.01"]
    arguments += ["--against", "reference"]
    keep = ["--json", str(paths["json"]), "--html", str(paths["html"])]
    assert cli.main([*arguments, *keep, "--markdown", str(paths["md"])]) == 0
    shown = capsys.readouterr().out
    for title in ("LSTM inference, 1 thread", "RNN training, 1 thread", "RNN streaming"):
        assert title in shown
    made = json.loads(paths["json"].read_text("utf-8"))
    assert len(made["cases"]) == 18
    assert made["interrupted"] is False
    assert made["config"]["isa"] == fr.get_isa()
    page = paths["html"].read_text("utf-8")
    assert page.count("<svg") >= 4
    assert not re.search(r"(src|href)=\"https?:", page.replace("xlink:href", ""))
    assert "| 3, 2, 16, 16 |" in paths["md"].read_text("utf-8")

    assert cli.main([*arguments, "--compare", str(paths["json"])]) == 0
    assert "Of 18 cases of both runs: " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.html", "run.json", "run.md"]


def test_a_comparison_resolves_what_is_outside_of_both_spreads() -> None:
    def result(name: str, seconds: list[float], **ratios: list[float]) -> dict[str, Any]:
        of_ours = {"ours": seconds}
        return {"case": name, "sizes": [1, 1, 1, 1], "seconds": of_ours, "ratios": ratios}

    usual, half, same = [2.0, 1.9, 2.1], [1.0, 0.9, 1.1], [2.0, 2.0, 2.0]
    peers = {"torch": [3.0, 2.9, 3.1], "openvino": same}
    lost = {"torch": [1.5, 1.4, 1.6], "openvino": [1.0, 1.0, 1.0]}
    names = ("a slower machine", "peers agree", "peers do not")
    before = [result(name, usual) for name in ("times alone", "times that overlap", "gone")]
    before += [result(name, usual, **peers) for name in names]
    now = [
        result("times alone", half),
        result("times that overlap", [2.1, 2.0, 2.3]),
        result("a slower machine", [4.0, 3.9, 4.1], **peers),
        result("peers agree", usual, **lost),
        result("peers do not", usual, **(lost | {"openvino": same})),
        result("new", usual),
    ]
    rows = tables.comparison(before, now).rows
    assert {row[0]: row[-1] for row in rows} == {
        "times alone": "faster",
        "times that overlap": "not resolved",
        "a slower machine": "not resolved",
        "peers agree": "slower",
        "peers do not": "not resolved",
    }


def test_a_wrong_result_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: cases.Case, inputs: contenders.Inputs) -> contenders.Run:
        T, B, _, H = case.sizes
        return lambda: {"y": np.full((T, B, H), np.nan)}

    monkeypatch.setitem(contenders.CONTENDERS, "reference", wrong)
    arguments = [*SMALL, "--modes", "inference", "--cells", "GRU", "--against", "reference"]
    assert cli.main(arguments) == 1
    assert "WRONG GRU-3,2,4,8-inference-1: reference, y off by nan" in capsys.readouterr().out
    monkeypatch.setitem(contenders.CONTENDERS, "ours", wrong)
    assert cli.main(arguments) == 1
    assert "WRONG" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, done = race.measure, []

    def interrupted(case: cases.Case, *rest: Any, **options: Any) -> race.Result:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(case)
        return measure(case, *rest, **options)

    monkeypatch.setattr(race, "measure", interrupted)
    path = tmp_path / "run.json"
    assert cli.main([*SMALL, "--against", "--json", str(path)]) == 130
    made = json.loads(path.read_text("utf-8"))
    assert made["interrupted"] is True
    assert len(made["cases"]) == 2
    assert "Interrupted after 2 cases." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "properties", "--only", "speed"], "--only must match one of scaling,"),
        (["--suite", "properties", "--shapes", "weather"], "--shapes is for cases"),
        (["--forms", "bent"], "--forms must be among two-layers, both-directions"),
        (["--only", "TCN"], "--only TCN matches the name of none of"),
        (["--seconds", "0"], "must be a positive number of seconds, got '0'"),
        (["--suite", "slow"], "invalid choice: 'slow'"),
        (["--cells", "LSTM", "TCN"], "invalid choice: 'TCN'"),
        (["--shapes", "1,2,3"], "--shapes must be T,B,I,H"),
        (["--shapes", "0,2,3,4"], "--shapes must be T,B,I,H"),
        (["--shapes", "1,1,1,99999999"], "no array may have more than"),
        (["--threads", "0"], "must be an integer from 1"),
        (["--threads", "9999"], "--threads must be at most"),
        (["--dtypes", "float16"], "--dtypes must be among float32, float64, bfloat16 on cpu"),
        (["--against", "haste"], "--against must be among torch, onnxruntime"),
        (["--json", "nowhere/run.json"], "--json cannot be written"),
        (["--json", "run.txt"], "--json must end in .json"),
        (["--html", "."], "--html must end in .html"),
        (["--compare", "nowhere.json"], "--compare cannot be read, No such file"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: Any = cli.main(["bench", *arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert printed.err.startswith("fusedrnn bench: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


def test_a_property_is_shown_and_kept(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"run.{name}" for name in ("json", "html", "md")}
    arguments = ["bench", "--suite", "properties", "--only", "soak", "--seconds", "0.2"]
    keep = [f"--{name}={paths[name]}" for name in ("json", "html")]
    assert cli.main([*arguments, *keep, "--report", str(paths["md"])]) == 0
    assert "threads ended" in capsys.readouterr().out
    [table] = json.loads(paths["json"].read_text("utf-8"))["tables"]
    assert [row[0] for row in table["rows"]] == ["1", "8"]
    assert "### soak" in paths["md"].read_text("utf-8")
    assert "<h3>soak</h3>" in paths["html"].read_text("utf-8")


@pytest.mark.parametrize("name", properties.PROPERTIES)
def test_every_property_has_a_table_head(name: str) -> None:
    if name in ("gemm", "modules", "team"):
        pytest.importorskip({"gemm": "scipy_openblas32"}.get(name, "torch"))
    columns = next(properties.PROPERTIES[name]())
    assert len(columns) > 1
    fr.set_num_threads(0)


def test_a_budget_leaves_cases_out(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--against", "--cells", "GRU", "--budget", "1e-9"]
    assert cli.main(arguments) == 0
    assert "Left out 3 cases: the time was over." in capsys.readouterr().out


RESULT = {"case": "GRU", "sizes": [1], "seconds": {"ours": [1, 1, 1]}, "ratios": {}}


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        "{",
        '{"format": 0}',
        '{"format": 1, "cases": 3}',
        "[" * 100_000,
        *(
            json.dumps({"format": 1, "cases": [RESULT | {"seconds": {"ours": times}}]})
            for times in ([], [1, 2], [0, 0, 0], [-1, 1, 1], [10**400] * 3, ["1"] * 3, 5)
        ),
        json.dumps({"format": 1, "cases": [RESULT | {"ratios": {"torch": [1, 1]}}]}),
    ],
    ids=lambda text: text[:60],
)
def test_what_is_no_earlier_run_is_refused(
    text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, "utf-8")
    assert cli.main(["bench", "--compare", str(path), "--json", str(path)]) == 2
    assert re.fullmatch(r"fusedrnn bench: --compare .*\n", capsys.readouterr().err)
    assert path.read_text("utf-8") == text


SIGNAL_AFTER_OPENVINO = """
import signal
from fusedrnn.bench import cases, contenders

def make():
    case = cases.Case("LSTM", "", (2, 1, 8, 8), "inference")
    return contenders.openvino(case, contenders.Inputs.of(case))

runs = [make(), make()]
del runs[0], runs[0]
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


def test_signals_arrive_after_openvino_ran() -> None:
    """OpenVINO's models, freed in the order in which they were made, leave signals alone."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    command = [sys.executable, "-c", SIGNAL_AFTER_OPENVINO]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_a_peer_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(contenders.NEEDS, "openvino", ("openvino_of_nobody",))
    assert cli.main(["bench", "--against", "openvino"]) == 2
    assert 'pip install "fusedrnn[peers]"' in capsys.readouterr().err


def test_a_page_without_matplotlib_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fusedrnn.bench.page", raising=False)
    monkeypatch.delattr("fusedrnn.bench.page", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*SMALL, "--html", str(tmp_path / "run.html")]) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith('pip install "fusedrnn[bench]"\n')
    assert printed.out == ""


@pytest.mark.skipif(fr.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert re.fullmatch(
        r"fusedrnn bench: --device cuda: there is no GPU.*\n", capsys.readouterr().err
    )


@pytest.mark.skipif(fr.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_process_reports_what_failed() -> None:
    """A process that loses its device says so, and ends."""
    pytest.importorskip("torch", reason="a GPU is timed through PyTorch")
    process = worker.Worker()
    try:
        with pytest.raises(RuntimeError, match="the device is lost"):
            process.ask("latency", 128)
        assert process._process is None
    finally:
        process.stop()


def _never_answer(connection: Any) -> None:
    connection.send("ready")
    connection.recv()
    time.sleep(600)


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes too long for a case is killed."""
    monkeypatch.setattr(worker, "_work", _never_answer)
    process = worker.Worker()
    try:
        with pytest.raises(RuntimeError, match="no answer in 0 s"):
            process.ask("latency", 128, seconds=0.1)
        assert process._process is None
    finally:
        process.stop()


def test_the_same_build_before_gives_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--cells", "GRU", "--before", sys.executable]) == 0
    shown = capsys.readouterr().out
    assert "× before" in shown
    assert "Other bits" not in shown


def test_bfloat16_races_with_its_errors(tmp_path: pathlib.Path, capsys: Any) -> None:
    """Cases of bfloat16 run beside PyTorch's and ours in float32, with their errors."""
    path = tmp_path / "bfloat16.json"
    arguments = ["--dtype", "bfloat16", "--shapes", "5,4,6,16", "--seconds", "0.01"]
    arguments += [
        "--modes",
        "training",
        "--cells",
        "LSTM",
        "--threads",
        "1",
        "--json",
        str(path),
    ]
    assert cli.main(["bench", *arguments]) == 0
    (case,) = json.loads(path.read_text("utf-8"))["cases"]
    assert case["dtype"] == "bfloat16"
    assert "float32" in case["seconds"]
    assert 1e-4 < case["y errors"]["ours"] < 1e-2
    assert case["y errors"]["float32"] < 1e-5
    assert "LSTM training, 1 thread, bfloat16" in capsys.readouterr().out


def test_narrow_weights_race_with_their_errors(tmp_path: pathlib.Path) -> None:
    """Each precision is timed against peers of as many bits, and errors are told."""
    file = tmp_path / "narrow.json"
    weights = ["--weights", "int8,bfloat16", "--cells", "LSTM", "--modes", "inference"]
    assert cli.main([*SMALL, *weights, "--json", str(file)]) == 0
    found = json.loads(file.read_text("utf-8"))["cases"]
    assert [case["weights"] for case in found] == ["int8", "bfloat16"]
    for case in found:
        assert 1e-7 < case["y errors"]["ours"] < 3e-2
        assert case["y errors"]["float32"] < 1e-5
        assert not case["wrong"]
    assert tables.Group.of(found[0]) != tables.Group.of(found[1])
    titles = [table.title for table in tables.tables(found)]
    assert "Largest error of y, LSTM inference, 1 thread, int8 weights" in titles
    for arguments, message in (
        (
            ["--weights", "int4"],
            "--weights must be among int8, int8-x8, bfloat16, float16, got int4",
        ),
        (["--weights", "int8", "--dtypes", "float64"], "only be measured on the CPU"),
    ):
        assert cli.main([*SMALL, *arguments]) == 2, message
