"""Find speech with silero-vad, whose LSTM takes a step a chunk, and the same on our kernels.

    pip install --no-deps silero-vad
    pip install onnx onnxruntime packaging threadpoolctl torch
    python examples/packages/silero.py

Its model is a TorchScript file, in which no module can be replaced, so a small class calls the
parts around an LSTM of ours: chunk by chunk, for sound that arrives, by a stream or by a cell,
or all chunks in one call, for a file. silero-vad itself has that, too, in onnxruntime. Its
model for onnxruntime runs as it is with our provider.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared import Case, Package, Pair, difference, main, speech

import fusedrnn as fr
from fusedrnn import convert

PACKAGE = Package(
    "silero-vad",
    ("silero_vad", "onnx", "onnxruntime", "packaging", "torch"),
    "pip install --no-deps silero-vad, and onnx onnxruntime packaging threadpoolctl torch",
)


def session_with_provider() -> Any:
    """Return a session of silero-vad's own model of ONNX that has our provider."""
    from importlib.resources import files

    import onnxruntime

    from fusedrnn.onnx import add_provider

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    add_provider(options)
    path = files("silero_vad") / "data" / "silero_vad.onnx"
    return onnxruntime.InferenceSession(path, options)


def cases(short: bool) -> Iterator[Case]:
    """Yield a recording, chunk by chunk and as a whole."""
    import silero_vad
    import torch

    import fusedrnn.torch as ft

    class ByStream:
        """The model's parts around a stream of ours."""

        def __init__(self, model: Any) -> None:
            self.parts = model._model
            self.lstm = convert.from_torch(self.parts.decoder.rnn.state_dict())
            self.stream = fr.Stream(self.lstm)
            self.reset_states()

        def __call__(self, chunk: Any, rate: int) -> Any:
            x = torch.cat([self.context, chunk[None]], 1)
            self.context = x[:, -64:]
            return self.decode(self.step(self.encode(x)))

        def reset_states(self) -> None:
            self.context = torch.zeros(1, 64)
            self.stream.reset()

        def step(self, x: Any) -> Any:
            return torch.from_numpy(self.stream.step(x.numpy()))

        def encode(self, x: Any) -> Any:
            return self.parts.encoder(self.parts.run_extractors(x))[:, :, 0]

        def decode(self, h: Any) -> Any:
            return self.parts.decoder.decoder(h[:, :, None])[:, 0]

        def whole(self, sound: Any) -> Any:
            """Return the results of all chunks, each with the end of the one before."""
            chunks = torch.nn.functional.pad(sound, (64, 0)).unfold(0, 64 + 512, 512)
            y, _ = self.lstm(self.encode(chunks).numpy())
            return self.decode(torch.from_numpy(y))

    class ByCell(ByStream):
        """The model's parts around a cell of ours."""

        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.cell = ft.LSTMCell(128, 128)
            self.cell.load_state_dict(self.parts.decoder.rnn.state_dict())

        def reset_states(self) -> None:
            self.context, self.state = torch.zeros(1, 64), None

        def step(self, x: Any) -> Any:
            self.state = self.cell(x, self.state)
            return self.state[0]

    def each(model: Any) -> Any:
        """Return the results of all chunks, one after the other."""
        model.reset_states()
        return torch.stack([model(chunk, 16_000)[0] for chunk in sound.split(512)])

    count = 30 if short else 1000
    sound = torch.from_numpy(speech(count * 512 / 16_000, pitch=100))
    own, by_onnx = silero_vad.load_silero_vad(), silero_vad.load_silero_vad(onnx=True)
    at_once = silero_vad.load_silero_vad(sequence=True)
    by_stream, by_cell = ByStream(own), ByCell(own)
    provided = silero_vad.load_silero_vad(onnx=True)
    provided.session = session_with_provider()
    x, state = torch.randn(1, 128), (torch.zeros(1, 128), torch.zeros(1, 128))

    def cell(model: Any) -> Pair:
        return Pair(lambda: own._model.decoder.rnn(x, state), lambda: model.step(x))

    def whole_by_onnx() -> Any:
        return at_once.audio_forward(sound.numpy())[:, None]

    with torch.inference_mode():
        chunks = f"{count} chunks of 32 ms"
        expected, whole = each(own), by_stream.whole(sound)
        for name, ours in (("`fr.Stream`", by_stream), ("`ft.LSTMCell`", by_cell)):
            yield Case(
                f"{chunks}, one by one, {name}",
                lines=19,
                difference=difference(each(ours), expected),
                whole=Pair(lambda: each(own), lambda m=ours: each(m)),
                recurrent=cell(ours),
            )
        yield Case(
            f"{chunks}, one by one, `fr.Stream` against onnxruntime",
            lines=19,
            difference=difference(each(by_stream), each(by_onnx)),
            whole=Pair(lambda: each(by_onnx), lambda: each(by_stream)),
        )
        yield Case(
            f"{chunks}, one by one, its own model in onnxruntime with our provider",
            lines=4,
            difference=difference(each(provided), each(by_onnx)),
            whole=Pair(lambda: each(by_onnx), lambda: each(provided)),
        )
        yield Case(
            f"{chunks} at once, `fr.LSTM` against one by one",
            lines=6,
            difference=difference(whole, expected),
            whole=Pair(lambda: each(own), lambda: by_stream.whole(sound)),
        )
        yield Case(
            f"{chunks} at once, `fr.LSTM` against onnxruntime",
            lines=6,
            difference=difference(whole, whole_by_onnx()),
            whole=Pair(whole_by_onnx, lambda: by_stream.whole(sound)),
        )


if __name__ == "__main__":
    main(__doc__, {PACKAGE: cases})
