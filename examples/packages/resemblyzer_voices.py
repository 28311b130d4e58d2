"""Embed voices with resemblyzer's three LSTMs, and the same on our kernels and in 8 bits.

    pip install --no-deps resemblyzer
    pip install librosa webrtcvad-wheels threadpoolctl torch
    python examples/packages/resemblyzer_voices.py

The cosine of two embeddings says whether two recordings are of one voice. The metric of rounded
weights is the rate of errors in this, at the threshold where both kinds of error are as
frequent, for recordings of voices that differ in pitch; all of a comparison's embeddings come
from one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from shared import Case, Package, Pair, difference, main, speech

PACKAGE = Package(
    "Resemblyzer",
    ("resemblyzer", "librosa", "webrtcvad", "torch"),
    "pip install --no-deps resemblyzer, and librosa webrtcvad-wheels threadpoolctl torch",
)
# By precision: the largest difference of an element of an embedding, whose norm is 1.
LIMITS = {"float32": 1e-5, "bfloat16": 5e-3, "int8": 0.2}


def equal_error(embed: Callable[[Any], Any], voices: int, recordings: int, seconds: int) -> str:
    """Return the rate at which an embedding mistakes voices, in words."""
    each = [(voice, k) for voice in range(voices) for k in range(recordings)]
    found = np.stack([embed(speech(seconds, 80 * 1.06**v, v + 100 * k)) for v, k in each])
    one, other = np.triu_indices(len(each), 1)
    cosine = (found[one] * found[other]).sum(1)
    voice = np.array(each)[:, 0]
    same = voice[one] == voice[other]
    missed, mistaken = np.array(
        [((cosine[same] < c).mean(), (cosine[~same] >= c).mean()) for c in np.sort(cosine)]
    ).T
    at = np.abs(missed - mistaken).argmin()
    return f"{50 * (missed[at] + mistaken[at]):.1f} % of pairs wrong"


def cases(short: bool) -> Iterator[Case]:
    """Yield batches of different sizes, then a whole recording."""
    import torch
    from resemblyzer import VoiceEncoder, audio

    import fusedrnn.torch as ft

    own, ours = (VoiceEncoder("cpu", verbose=False) for _ in range(2))
    ft.swap(ours)
    models = {"float32": ours} | {n: ft.quantize(own, n).model for n in ("int8", "bfloat16")}
    voices = (3, 2, 2) if short else (20, 3, 6)
    wrong = {name: equal_error(m.embed_utterance, *voices) for name, m in models.items()}

    with torch.inference_mode():
        mels = audio.wav_to_mel_spectrogram(speech(20, 120))
        for B in (1, 3) if short else (1, 3, 8, 32, 100):
            starts = np.linspace(0, len(mels) - 160, B).astype(int)
            x = torch.from_numpy(np.stack([mels[start : start + 160] for start in starts]))
            for name, model in models.items():
                yield Case(
                    f"1.6 s, B = {B}, {name}",
                    lines=1,
                    difference=difference(model(x), own(x)),
                    whole=Pair(lambda x=x: own(x), lambda m=model, x=x: m(x)),
                    recurrent=Pair(lambda x=x: own.lstm(x), lambda m=model, x=x: m.lstm(x)),
                    limit=LIMITS[name],
                )
    sound = speech(4 if short else 60, 180)
    for name, model in models.items():
        yield Case(
            f"a recording of {len(sound) // 16_000} s, {name}",
            lines=1,
            difference=difference(model.embed_utterance(sound), own.embed_utterance(sound)),
            whole=Pair(
                lambda: own.embed_utterance(sound), lambda m=model: m.embed_utterance(sound)
            ),
            limit=LIMITS[name],
            metric=wrong[name],
        )


if __name__ == "__main__":
    main(__doc__, {PACKAGE: cases})
