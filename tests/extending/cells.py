# Definitions that tests/extending.sh appends to src/fusedrnn/reference/cells.py.
# ruff: noqa: F821


def _gated(x: Array, h_dropped: Array, state: State, p: Parameters, o: Options) -> Step:
    a_x, pull_x = _input_part(x, slice(None), p)
    a_h, pull_h = _recurrent_part(h_dropped, slice(None), p)
    bounded, passes = _clipped(a_x + a_h, o.clip)
    a_i, a_g = blocks(bounded, 2)
    i, g = sigmoid(a_i), module_of(a_g).tanh(a_g)

    def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
        (dh,) = d
        da = np.concatenate([dh * g * i * (1 - i), dh * i * (1 - g**2)], -1) * passes
        return pull_x(da, into), pull_h(da, into), (np.zeros_like(dh),)

    return Step((i * g,), {"i": i, "g": g}, pull)


def _ligru(x: Array, h_dropped: Array, state: State, p: Parameters, o: Options) -> Step:
    (h_prev,) = state
    a_x, pull_x = _input_part(x, slice(None), p)
    a_h, pull_h = _recurrent_part(h_dropped, slice(None), p)
    bounded, passes = _clipped(a_x + a_h, o.clip)
    a_z, a_n = blocks(bounded, 2)
    z = sigmoid(a_z)
    n = module_of(a_n).where(a_n.real <= 0, module_of(a_n).zeros_like(a_n), a_n)

    def pull(d: State, into: Gradients) -> tuple[Array, Array, State]:
        (dh,) = d
        dz, dn = dh * (h_prev - n), dh * (1 - z)
        da = np.concatenate([dz * z * (1 - z), dn * (n.real > 0)], -1) * passes
        return pull_x(da, into), pull_h(da, into), (dh * z,)

    return Step((z * h_prev + (1 - z) * n,), {"z": z, "n": n}, pull)


RNN["gated"] = Cell("ig", ("h",), _gated)
RNN["ligru"] = Cell("zn", ("h",), _ligru, jumps=True)
