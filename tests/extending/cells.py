# Definitions that tests/extending.sh appends to src/fusedrnn/reference/cells.py.
# ruff: noqa: F821


def _gated(x: Array, h_dropped: Array, state: State, p: Parameters, o: Options) -> Step:
    phi, phi_gate = o.activation or TANH, o.recurrent_activation or SIGMOID
    a_x, pull_x = _input_part(x, slice(None), p)
    a_h, pull_h = _recurrent_part(h_dropped, slice(None), p)
    a_i, a_g = blocks(a_x + a_h, 2)
    i, passes_i = _activated(phi_gate, a_i, p, o)
    g, passes_g = _activated(phi, a_g, p, o)

    def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
        (dh,) = d
        da_i = dh * g * phi_gate.slope(i) * passes_i
        da_g = dh * i * phi.slope(g) * passes_g
        da = np.concatenate([da_i, da_g], -1)
        return pull_x(da, into), pull_h(da, into), (np.zeros_like(dh),)

    return Step((i * g,), {"i": i, "g": g}, pull)


def _ligru(x: Array, h_dropped: Array, state: State, p: Parameters, o: Options) -> Step:
    (h_prev,) = state
    phi_gate = o.recurrent_activation or SIGMOID
    a_x, pull_x = _input_part(x, slice(None), p)
    a_h, pull_h = _recurrent_part(h_dropped, slice(None), p)
    a_z, a_n = blocks(a_x + a_h, 2)
    z, passes_z = _activated(phi_gate, a_z, p, o)
    n, passes_n = _activated(RELU, a_n, p, o)

    def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
        (dh,) = d
        da_z = dh * (h_prev - n) * phi_gate.slope(z) * passes_z
        da_n = dh * (1 - z) * RELU.slope(n) * passes_n
        da = np.concatenate([da_z, da_n], -1)
        return pull_x(da, into), pull_h(da, into), (dh * z,)

    return Step((z * h_prev + (1 - z) * n,), {"z": z, "n": n}, pull)


RNN["gated"] = Cell("ig", ("h",), _gated)
RNN["ligru"] = Cell("zn", ("h",), _ligru, ("recurrent_activation",), jumps=True)
