"""Which kernels a layer's call runs, why, and the least time it can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import checks, cuda, floor
from .backend.cpu import HOST
from .options import asked_of_call, asked_of_layer
from .reference import Options

if TYPE_CHECKING:
    from ._cpu import Layers
    from .layers import _Layer


class Explanation(dict[str, Any]):
    """The dict that `fusedrnn.LSTM.explain` returns; it prints as text."""

    def __str__(self) -> str:
        lines = [f"{self['layer']}: T = {self['T']}, B = {self['B']}, {self['mode']}"]
        lines += [
            f"  {name}: {self[name]}"
            for name in ("device", "isa", "weights", "way")
            if name in self
        ]
        lines += [f"    because {reason}" for reason in self["why"]]
        for name, plan in self["plans"].items():
            lines.append(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in plan.items()))
        lines.append(
            f"  {self['flops'] / 1e6:.3g} MFLOP, weights {self['weight_bytes'] / 1e3:.0f} kB, "
            f"x and y {self['io_bytes'] / 1e3:.0f} kB"
        )
        if "saved_bytes" in self:
            lines[-1] += f", saved {self['saved_bytes'] / 1e3:.0f} kB"
        if "floor" in self:
            lines.append(
                f"  at least {self['floor'] * 1e6:.3g} µs by this machine's arithmetic"
            )
        return "\n".join(lines)


def explain(
    layer: _Layer[Any], T: int, B: int, options: Options, training: bool
) -> Explanation:
    """Explain a call; see `_Layer.explain`."""
    T, B = checks.positive("T", T), checks.positive("B", B)
    H, R, G = layer.hidden_size, layer._width, len(layer._cell.gates)
    on_cpu = layer.device == "cpu"
    item = {"float64": 8, "bfloat16": 2, "float16": 2}.get(str(layer.dtype), 4)
    parameters = layer._all_parameters()
    in_use = asked_of_call(options) if on_cpu else []
    in_use += asked_of_layer(layer._cell, parameters[0], on_cpu)
    why = [f"the plain kernels do not support {', '.join(in_use)}"] if in_use else []
    explanation = Explanation(
        layer=repr(layer),
        T=T,
        B=B,
        mode="forward and backward" if training else "inference",
        device=layer.device,
        way="kernels with options" if in_use else "plain kernels",
        why=why or ["no option is in use that the plain kernels do not support"],
        plans={},
        flops=0,
        weight_bytes=sum(
            (p.itemsize if layer.weights else item) * p.shape[0] * _columns(p)
            for p in layer._parameters.values()
        ),
        io_bytes=0,
    )
    if on_cpu:
        layers = HOST.layers(layer._spec, parameters, layer._packed)
        explanation |= {"isa": layers.isa, "floor": 0.0, "saved_bytes": 0}
    if layer.weights:
        bits = f", x of {layer.x_bits or 16} bits" if layer.weights == "int8" else ""
        explanation["weights"] = layer.weights + bits
    for at, (l, _, suffix) in enumerate(layer._directions()):
        I = layer.input_size if l == 0 else R * (1 + layer.bidirectional)
        second = H * (H if layer._cell.resets_before else R if layer.proj_size else 0)
        recurrent = G * H * R - (H * H if layer._cell.resets_before else 0) + second
        explanation["flops"] += 2 * B * T * (G * H * I + recurrent) * (3 if training else 1)
        explanation["io_bytes"] += item * B * T * (I + R) * (2 if training else 1)
        explanation["plans"][suffix] = plan = (
            _on_cpu(layers, at, T, B, options)
            if on_cpu
            else _on_gpu(layer, T, B, I, training, bool(in_use))
        )
        if on_cpu:
            saved = plan.pop("saved bytes")
            if options.recompute:
                saved = max(item, 4) * H if "c" in layer._cell.states else 0
            explanation["saved_bytes"] += B * T * saved if training else 0
            sizes, single = (T, B, I, H), str(layer.dtype) == "float32"
            explanation["floor"] += floor.seconds(
                sizes,
                G,
                training,
                plan["threads"],
                single,
                recurrent,
                layer.weights or ("bfloat16" if item == 2 else None),
                max(getattr(parameters[at].weight_ih, "x_bits", 8) // 8, 1),
            )
    return explanation


def _columns(parameter: Any) -> int:
    return int(parameter.shape[1]) if len(parameter.shape) == 2 else 1


def _on_cpu(layers: Layers, at: int, T: int, B: int, options: Options) -> dict[str, Any]:
    plan = layers.plan(at, T, B, options)
    rows, units = plan["tile"]
    owns = "rows of the batch" if plan["by_rows"] else "hidden units"
    threads = plan["threads"]
    of_x = "within the step" if plan["fused"] else f"of {plan['time_block']} steps at once"
    packing = "in each call, R being masked" if options.drops_weights else "kept by the layer"
    return {
        "threads": threads,
        "unit": plan["unit"],
        "tile": f"{rows} rows × {units} units",
        "W x": of_x,
        "each thread owns": owns if threads > 1 else "all",
        "packing": f"{packing}, {plan['packed_bytes'] / 1e3:.0f} kB",
        "scratch": f"{plan['workspace_bytes'] / 1e3:.0f} kB",
        "saved bytes": plan["saved"],
    }


def _on_gpu(
    layer: _Layer[Any], T: int, B: int, I: int, training: bool, row_wise: bool
) -> dict[str, Any]:
    if row_wise:
        return dict(cuda.ROW_WISE)
    number = int(layer.device.partition(":")[2])
    sizes = (T, B, I, layer.hidden_size, str(layer.dtype), layer.precision)
    plan = cuda.explain(layer._cell.name, *sizes, device=number)
    if training:
        backward = cuda.explain(layer._cell.name, *sizes, backward=True, device=number)
        plan |= {f"backward {k}": v for k, v in backward.items()}
    return plan
