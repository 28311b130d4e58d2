"""Forecast a week of Seattle's daily maximum temperature, in NumPy alone.

    pip install "fusedrnn[examples]"
    python examples/daily_weather.py --cell GRU

The data are the days of 2012 to 2015 in the package `vega_datasets`. Each day the layer reads
how far its maximum and minimum are from their seasonal curves, precipitation, wind and the time
of the year; a linear head predicts how far the next seven maxima will be from theirs. It is
trained on the years before the held-out one; sizes, rate and epochs were args with
--held-out 2014.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
from common import COLOURS, Outcome, keep, outcome, parse, parser

import fusedrnn as fr
from fusedrnn.demo import Forecaster, data_file
from fusedrnn.files import UserError

HORIZON, WINDOW, WARM_UP, BATCH, HIDDEN = 7, 60, 14, 32, 16
STYLES = ("-.", "--", ":", "-", "o-")
COLUMNS = ("temp_max", "temp_min", "precipitation", "wind")


def read_days(held_out: int) -> tuple[list[datetime], np.ndarray, int]:
    """Return the days up to a year's end, the observations, and the year's first index."""
    path = data_file("vega_datasets", "_data/seattle-weather.csv", "examples")
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    days = [datetime.strptime(record["date"], "%Y/%m/%d") for record in records]
    table = np.array([[float(record[name]) for name in COLUMNS] for record in records])
    first, last = (sum(day.year < year for day in days) for year in (held_out, held_out + 1))
    return days[:last], table[:last], first


def seasons(days: list[datetime]) -> np.ndarray:
    """Return (days, 5): a constant and two waves of the year."""
    angle = 2 * np.pi * np.array([day.timetuple().tm_yday for day in days]) / 365.25
    waves = [f(k * angle) for k in (1, 2) for f in (np.cos, np.sin)]
    return np.column_stack([np.ones(len(days)), *waves])


def ahead(series: np.ndarray) -> np.ndarray:
    """Return (days, 7), the week after each day; the last days have none and are left out."""
    return np.lib.stride_tricks.sliding_window_view(series[1:], HORIZON)


def train(
    cell: str,
    epochs: int,
    seed: int,
    held_out: int = 2015,
    rate: float = 4e-3,
    convert: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
    **extra: float,
) -> tuple[dict[str, np.ndarray], Outcome]:
    """Train a cell; return all forecasts (days of the held-out year, 7), and the outcome.

    There is one more forecast for each of `convert`, functions that replace the trained layer.
    """
    days, table, first = read_days(held_out)
    waves = seasons(days)
    curve = waves @ np.linalg.lstsq(waves[:first], table[:first, :2], rcond=None)[0]
    above = table[:, :2] - curve
    x = np.column_stack([above, np.log1p(table[:, 2]), table[:, 3], waves[:, 1:3]])
    x = ((x - x[:first].mean(0)) / x[:first].std(0)).astype(np.float32)
    scale = above[:first, 0].std()
    target = (ahead(above[:, 0]) / scale).astype(np.float32)

    rng = np.random.default_rng(seed)
    regularisation = {"zoneout": 0.1, "recurrent_dropout": 0.3}  # three years: it would overfit
    layer = getattr(fr, cell)(x.shape[1], HIDDEN, rng=rng, **regularisation, **extra)
    model, seconds = Forecaster(layer, rng, HORIZON, WARM_UP), []
    known = np.ones((WINDOW - WARM_UP, BATCH, HORIZON), bool)
    for epoch in range(epochs):
        begin, order = time.perf_counter(), rng.permutation(first - WINDOW - HORIZON)
        now = rate * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        for i in range(0, len(order) - BATCH + 1, BATCH):
            read = order[i : i + BATCH] + np.arange(WINDOW)[:, None]  # (T, B)
            model.train_step(x[read], target[read[WARM_UP:]], known, now)
        seconds.append(time.perf_counter() - begin)

    starts = np.arange(first, len(days) - HORIZON)  # the days of the forecasts
    season, anomaly = ahead(curve[:, 0])[starts], above[:, 0]
    past = anomaly[: first - HORIZON]
    fading = past @ ahead(anomaly)[: len(past)] / (past @ past)
    # All years are one sequence, so the state continues from the training years.
    predicted = model.predict(x[:, None])[starts, 0]
    others = {}
    for name, change in convert.items():
        model.layer = change(layer)
        others[name] = season + model.predict(x[:, None])[starts, 0] * scale
    dates = np.array([day.strftime("%m%d") for day in days])
    mean = {d: table[:first, 0][dates[:first] == d].mean() for d in set(dates[:first])}
    forecasts = {
        "today's temperature": np.repeat(table[starts, :1], HORIZON, axis=1),
        "mean of the day, years before": ahead(np.array([mean[d] for d in dates]))[starts],
        "seasonal curve": season,
        "seasonal curve, today's anomaly fading": season + fading * anomaly[starts, None],
        cell: season + predicted * scale,
        **others,
    }
    error = np.abs(forecasts[cell] - ahead(table[:, 0])[starts]).mean()
    return forecasts, outcome(layer, seconds, error)


def draw(forecasts: dict[str, np.ndarray], held_out: int, cell: str, output: Path) -> None:
    """Draw ten weeks of forecasts, and the errors by days ahead."""
    days, table, first = read_days(held_out)
    truth, season = ahead(table[:, 0])[first:], forecasts["seasonal curve"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.6), width_ratios=(2, 1), layout="constrained"
    )
    begin, shown = 120, slice(first + 120, first + 190)  # May to July
    left.plot(days[shown], table[shown, 0], "k", lw=1.4, label="observed")
    for i in range(begin, begin + 63, HORIZON):
        dates = [days[first + i] + timedelta(days=k + 1) for k in range(HORIZON)]
        name = None if i > begin else f"{cell}, a forecast every seventh day"
        left.plot(dates, forecasts[cell][i], color=COLOURS[cell], marker=".", label=name)
    after = days[shown][1:]  # the first value of a forecast belongs to the next day
    left.plot(after, season[begin : begin + 69, 0], "k:", label="seasonal curve")
    left.set(title=f"Maximum temperature in Seattle, {held_out}", ylabel="temperature, °C")
    left.xaxis.set_major_formatter(mdates.DateFormatter("%d %b"))
    for (name, forecast), style in zip(forecasts.items(), STYLES, strict=True):
        error = np.abs(forecast - truth).mean(0)
        colour = COLOURS[cell] if name == cell else "k"
        right.plot(range(1, HORIZON + 1), error, style, color=colour, label=name)
    right.set(title="Mean absolute error", xlabel="days ahead", ylabel="°C", ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=9)
        axes.grid(alpha=0.3)
    keep(figure, output)


def main() -> None:
    """Train, print the errors in °C, and draw."""
    arg_parser = parser(__doc__, "daily-weather.png", epochs=(10, 3))
    arg_parser.add_argument("--held-out", type=int, choices=(2014, 2015), default=2015)
    args = parse(arg_parser)
    try:
        forecasts, result = train(args.cell, args.epochs, args.seed, args.held_out)
    except UserError as error:
        arg_parser.error(str(error))
    _, table, first = read_days(args.held_out)
    truth = ahead(table[:, 0])[first:]
    print(f"Seattle, {args.held_out}, {len(truth)} forecasts, mean absolute error in °C:")
    print(f"{'':40}{'next 7 days':>12}{'tomorrow':>10}{'day 7':>8}")
    for name, forecast in forecasts.items():
        error = np.abs(forecast - truth).mean(0)
        print(f"{name:40}{error.mean():12.2f}{error[0]:10.2f}{error[-1]:8.2f}")
    print(f"{result.parameters} parameters, {result.epoch_seconds:.3f} s an epoch")
    draw(forecasts, args.held_out, args.cell, args.output)


if __name__ == "__main__":
    main()
