"""Forecast five stocks a month ahead, in NumPy alone, and compare with a random walk.

    pip install "fusedrnn[examples]"
    python examples/stocks.py
    python examples/stocks.py --cell LSTM --seed 1

The data are the monthly prices of 2000 to 2010 in the package `vega_datasets`. One layer is
trained on all five stocks, on log-returns up to March 2008; it reads each stock's return, the
return's absolute value, and the mean of all five. The last 24 months are held out, and nothing
was tuned on them. The forecast to beat is a random walk, which predicts no change.
"""

from __future__ import annotations

import csv
import time
from datetime import datetime
from pathlib import Path

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
from common import COLOURS, Outcome, keep, outcome, parse, parser

import fusedrnn as fr
from fusedrnn.demo import Forecaster, data_file
from fusedrnn.files import UserError
from fusedrnn.reference import Array

STOCKS = ("AAPL", "AMZN", "GOOG", "IBM", "MSFT")
HELD_OUT, WARM_UP, HIDDEN = 24, 12, 8  # months, months, units


def read() -> tuple[list[datetime], Array]:
    """Return the months and the prices (months, stocks), NaN before a stock was listed."""
    path = data_file("vega_datasets", "_data/stocks.csv", "examples")
    by_month: dict[datetime, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            month = datetime.strptime(record["date"], "%b %d %Y")
            by_month.setdefault(month, {})[record["symbol"]] = float(record["price"])
    months = sorted(by_month)
    return months, np.array([[by_month[m].get(s, np.nan) for s in STOCKS] for m in months])


def train(cell: str, epochs: int, seed: int) -> tuple[dict[str, Array], Array, Outcome]:
    """Train a cell; return forecasts of log-returns, the true ones, and the outcome."""
    returns = np.diff(np.log(read()[1]), axis=0)  # (months, stocks)
    known = ~np.isnan(returns)
    split = len(returns) - HELD_OUT
    scale = np.nanstd(returns[:split])
    filled = np.where(known, returns, 0) / scale
    market = np.broadcast_to(np.nanmean(returns, axis=1, keepdims=True) / scale, filled.shape)
    x = np.stack([filled, np.abs(filled), market], axis=-1).astype(np.float32)  # (T, B, I)
    target = filled[1:, :, None].astype(np.float32)  # the next month

    rng = np.random.default_rng(seed)
    layer = getattr(fr, cell)(x.shape[2], HIDDEN, zoneout=0.1, rng=rng)
    model, seconds = Forecaster(layer, rng, 1, WARM_UP), []
    read_months = slice(WARM_UP, split - 1)
    for epoch in range(epochs):  # all years are one sequence and one training step
        begin, rate = time.perf_counter(), 5e-3 * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        known_next = known[1:][read_months, :, None]
        model.train_step(x[: split - 1], target[read_months], known_next, rate)
        seconds.append(time.perf_counter() - begin)
    predicted = model.predict(x[:-1])[:, :, 0] * scale
    forecasts = {
        "random walk: no change": np.zeros_like(returns[1:]),
        "the stock's mean of the training months": np.broadcast_to(
            np.nanmean(returns[:split], axis=0), returns[1:].shape
        ),
        cell: predicted,
    }
    error = np.abs(predicted - returns[1:])[-HELD_OUT:].mean()
    return forecasts, returns[1:], outcome(layer, seconds, 100 * error)


def draw(forecasts: dict[str, Array], truth: Array, cell: str, output: Path) -> None:
    """Draw each stock's held-out prices with the forecasts made a month before."""
    months, prices = read()
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.8), layout="constrained")
    shown = slice(len(months) - HELD_OUT, None)
    before = prices[-HELD_OUT - 1 : -1]
    for i, (stock, panel) in enumerate(zip(STOCKS, axes.flat, strict=False)):
        ahead = before[:, i] * np.exp(forecasts[cell][-HELD_OUT:, i])
        panel.plot(months[shown], prices[shown, i], "k.-", ms=4, label="price")
        panel.plot(months[shown], before[:, i], "k:", label="random walk, a month before")
        panel.plot(months[shown], ahead, color=COLOURS[cell], label=f"{cell}, a month before")
        panel.set(title=stock, ylabel="price, $")
        panel.xaxis.set_major_locator(mdates.MonthLocator(bymonth=(1, 7)))
        panel.xaxis.set_major_formatter(mdates.DateFormatter("%b %y"))
        panel.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    last = axes[1, 2]
    predicted, true = (100 * a[-HELD_OUT:] for a in (forecasts[cell], truth))
    last.plot(predicted.ravel(), true.ravel(), "o", ms=4, color=COLOURS[cell])
    last.axhline(0, color="k", lw=0.8)
    last.axvline(0, color="k", lw=0.8)
    last.set(title="All held-out months", xlabel=f"{cell}: log-return, %", ylabel="true, %")
    last.grid(alpha=0.3)
    figure.suptitle("A forecast drawn over prices looks good: it is about last month's price")
    keep(figure, output)


def main() -> None:
    """Train, print errors and hits beside those of the baselines, and draw."""
    arg_parser = parser(__doc__, "stocks.png", epochs=(150, 20))
    args = parse(arg_parser)
    try:
        forecasts, truth, result = train(args.cell, args.epochs, args.seed)
    except UserError as error:
        arg_parser.error(str(error))
    held_out = truth[-HELD_OUT:]
    print(f"{len(STOCKS)} stocks, {HELD_OUT} months held out; errors are of log-returns")
    print(f"{'':41}{'training':>10}{'held out':>10}{'right direction':>17}")
    for name, forecast in forecasts.items():
        error = 100 * np.abs(forecast - truth)
        hits = (forecast[-HELD_OUT:] > 0) == (held_out > 0)
        direction = f"{hits.sum()} of {hits.size}" if forecast.any() else "none"
        training_error, test_error = np.nanmean(error[:-HELD_OUT]), error[-HELD_OUT:].mean()
        print(f"{name:41}{training_error:8.2f} %{test_error:8.2f} %{direction:>17}")
    walk = np.abs(held_out)
    gain = 100 * (walk - np.abs(forecasts[args.cell][-HELD_OUT:] - held_out)).mean(1)
    # Stocks move together, so each month is one observation, not five.
    doubt = gain.std(ddof=1) / HELD_OUT**0.5
    verdict = "beats" if gain.mean() > 2 * doubt else "DOES NOT BEAT"
    print(f"{args.cell} {verdict} the random walk: {gain.mean():+.2f} ± {doubt:.2f} % a month")
    print(f"{result.parameters} parameters, {result.epoch_seconds:.4f} s an epoch")
    draw(forecasts, truth, args.cell, args.output)


if __name__ == "__main__":
    main()
