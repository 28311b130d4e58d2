"""Forecast New York's temperature from hours that arrive one at a time.

    pip install "fusedrnn[examples]"
    python examples/streaming.py --cell LSTM

A cell is trained as by `fusedrnn demo` on the hourly weather of January to September 2013. Then
a `Stream`, which keeps the state, reads the hours of the rest of the year one by one, and after
each the next 24 are forecast. The example prints how long a step takes, and whether the layer's
results are, bit for bit, those of one call over all these hours.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
from common import COLOURS, Outcome, keep, outcome, parse, parser
from rich.console import Console
from rich.progress import Progress

import fusedrnn as fr
from fusedrnn import demo
from fusedrnn.files import UserError
from fusedrnn.reference import Array

AIRPORT, HIDDEN = "JFK", 48
FIRST = 24 * (demo.HELD_OUT_DAYS + demo.VALIDATION_DAYS)  # hours before the end: 1 October


def train(
    cell: str,
    epochs: int,
    seed: int,
    rate: float = 4e-3,
    validate: bool = False,
    **extra: float,
) -> tuple[demo.Forecaster, demo.Samples, float, Outcome]:
    """Train on all airports; return the model, JFK's samples, their scale, and the outcome.

    The error is the mean absolute error of the next 24 hours in the held-out days, in °F. With
    `validate` October is held out instead. `extra` are options of the layer.
    """
    weather = demo.read_weather(demo.weather_file())
    hours = len(weather[AIRPORT].temperature)
    prepared = {name: demo.prepare(w, hours - FIRST) for name, w in weather.items()}
    samples, scale = prepared[AIRPORT]
    rng = np.random.default_rng(seed)
    layer = getattr(fr, cell)(samples.x.shape[1], HIDDEN, rng=rng, **extra)
    model = demo.Forecaster(layer, rng)
    everyone = [s for s, _ in prepared.values()]
    with Progress(console=Console(width=100), disable=True) as progress:
        seconds = demo.train(model, everyone, hours - FIRST, epochs, rng, progress, scale, rate)
    end = -24 * demo.HELD_OUT_DAYS
    # No forecast in October is of an hour in November.
    scored = slice(-FIRST, end - demo.HORIZON) if validate else slice(end, None)
    wrong = np.abs(model.predict(samples.x[:, None])[:, 0] - samples.change)[scored]
    error = scale * wrong[samples.known[scored]].mean()
    return model, samples, scale, outcome(model.layer, [seconds], error)


def stream(model: demo.Forecaster, x: Array) -> tuple[Array, Array, Array]:
    """Run the model over x (hours, F), one hour at a time.

    Returns the layer's results (hours, H), the predicted changes (hours, 24), scaled, and the
    nanoseconds of the layer's step and of the head (hours, 2).
    """
    steps = fr.Stream(model.layer, batch_size=None)
    results, changes, times = [], [], []
    for hour in x:
        begin = time.perf_counter_ns()
        y = steps.step(hour)
        stepped = time.perf_counter_ns()
        changes.append(model.read_out(y))
        times.append((stepped - begin, time.perf_counter_ns() - stepped))
        results.append(y)
    return np.stack(results), np.stack(changes), np.array(times)


def draw(cell: str, weather: demo.Weather, forecast: Array, times: Array, output: Path) -> None:
    """Draw ten days with their forecasts 6 and 24 hours before, and the times of steps."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.4), width_ratios=(2, 1), layout="constrained"
    )
    begin, count = len(weather.temperature) - 30 * 24, 10 * 24
    shown = np.arange(begin, begin + count)
    dates = [weather.start + timedelta(hours=int(hour)) for hour in shown]
    left.plot(dates, weather.temperature[shown], "k", lw=1.6, label="observed")
    for before, style in ((6, "-"), (24, ":")):
        predicted = forecast[shown - before, before - 1]  # forecast[t, k - 1] is for hour t + k
        label = f"{cell}, {before} hours before"
        left.plot(dates, predicted, style, color=COLOURS[cell], label=label)
    left.set(
        title=f"Temperature at {AIRPORT}, forecast after each hour", ylabel="temperature, °F"
    )
    left.xaxis.set_major_formatter(mdates.DateFormatter("%d %b"))
    left.legend()
    micro = times / 1000
    edges = np.geomspace(micro.min(), np.percentile(micro, 99.9), 60)
    right.hist(micro, edges, color=COLOURS[cell])
    for percent, style in ((50, "-"), (99, "--")):
        at = np.percentile(micro, percent)
        right.axvline(at, color="k", ls=style, lw=1, label=f"{percent}%: {at:.1f} µs")
    right.set(title="A step of the layer", xlabel="µs", ylabel="hours", xscale="log")
    ticks = [t for t in (1, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20, 50) if edges[0] <= t <= edges[-1]]
    right.set_xticks(ticks, [f"{t:g}" for t in ticks])
    right.set_xticks([], minor=True)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    keep(figure, output)


def main() -> None:
    """Train, stream the rest of the year, print errors and times, and draw."""
    arg_parser = parser(__doc__, "streaming.png", epochs=(3, 1))
    args = parse(arg_parser)
    try:
        model, samples, scale, _ = train(args.cell, args.epochs, args.seed)
    except UserError as error:
        arg_parser.error(str(error))
    weather = demo.read_weather(demo.weather_file())[AIRPORT]
    x = samples.x[-FIRST:]
    results, changes, times = stream(model, x)
    whole, _ = model.layer(x[:, None])
    same = np.array_equal(results, whole[:, 0])
    verdict = "equal bit for bit" if same else "DIFFER FROM"
    print(f"{len(x)} hours streamed from 1 October; the results {verdict} one call over all.")

    held_out = slice(-24 * demo.HELD_OUT_DAYS, None)
    known, change = samples.known[held_out], samples.change[held_out]
    error = scale * np.abs(changes[held_out] - change)[known].mean()
    unchanged = scale * np.abs(change)[known].mean()
    print("November and December, mean absolute error of the next 24 hours: ", end="")
    print(f"{error:.2f} °F (no change: {unchanged:.2f} °F)")
    for name, took in (("layer", times[:, 0]), ("head", times[:, 1])):
        at = "  ".join(f"{p}%: {np.percentile(took, p) / 1000:.1f}" for p in (50, 90, 99, 99.9))
        print(f"µs a step, {name:5}  {at}")
    forecast = np.full((len(samples.x), demo.HORIZON), np.nan)
    forecast[-FIRST:] = weather.temperature[-FIRST:, None] + scale * changes
    draw(args.cell, weather, forecast, times[:, 0], args.output)


if __name__ == "__main__":
    main()
