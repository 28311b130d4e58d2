"""Turn text into sounds with g2pM and g2p_en, and the same on our kernels.

    pip install g2pM threadpoolctl
    pip install g2p_en threadpoolctl
    python examples/packages/g2p.py

g2pM finds the pronunciation of Chinese characters that have several, by a bidirectional LSTM;
g2p_en that of English words that its dictionary lacks, by two GRUs. Both loop over steps in
NumPy. g2p_en loads its dictionary and a tagger of parts of speech over the network when it is
imported; the script does without them and asks for words that no dictionary has.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from shared import Case, Package, Pair, difference, main

import fusedrnn as fr
from fusedrnn import convert

CHINESE = Package("g2pM", ("g2pM",), "pip install g2pM threadpoolctl")
ENGLISH = Package("g2p-en", ("g2p_en", "nltk"), "pip install g2p_en threadpoolctl")
CLAUSES = (
    "今天的天气很好,",
    "我们都还在等他把书还给图书馆的长者,",
    "银行的行长说这里的音乐让人快乐,",
    "他觉得睡觉以后得重新数一数重量的数目,",
)
WORDS = (
    "activationist",
    "unsqueezable",
    "microbenchmark",
    "vectorizability",
    "recurrently",
    "defenestrator",
    "quantizers",
    "zoneouts",
)


class Recorded:
    """A function that keeps its last result."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        self.result = self.function(*arguments)
        return self.result


def chinese(short: bool) -> Iterator[Case]:
    """Yield sentences of different lengths."""
    from g2pM import G2pM

    class OnOurs(G2pM):
        """The loop over steps is one call of a layer."""

        def load_variable(self, state_dict: Any) -> None:
            super().load_variable(state_dict)
            self.lstm = convert.from_torch(state_dict, prefix="lstm.")

        def predict(self, inputs: Any, target_idx: Any) -> Any:
            y, _ = self.lstm(self.get_embedding(inputs[0])[:, None])
            return self.fc_layer(y[target_idx, 0]).argmax(1)

    own, ours = G2pM(), OnOurs()
    for model in (own, ours):
        model.fc_layer = Recorded(model.fc_layer)
    for clauses in (1, 4) if short else (1, 4, 32):
        sentence = "".join(CLAUSES[k % len(CLAUSES)] for k in range(clauses))
        if own(sentence) != ours(sentence):
            raise SystemExit(f"g2pM: the pronunciation of {sentence} differs")
        yield Case(
            f"a sentence of {len(sentence)} characters",
            lines=7,
            difference=difference(ours.fc_layer.result, own.fc_layer.result),
            whole=Pair(lambda s=sentence: own(s), lambda s=sentence: ours(s)),
        )


def english(short: bool) -> Iterator[Case]:
    """Yield the same words, by our functions and by layers, which keep packed weights."""
    import nltk

    nltk.download = lambda *_: False
    from g2p_en import g2p

    g2p.cmudict = SimpleNamespace(dict=dict)

    class ByFunctions(g2p.G2p):
        """A sequence and a step are each a call of `fr.gru`."""

        def gru(self, x: Any, steps: int, *weights: Any, h0: Any) -> Any:
            return fr.gru(x.swapaxes(0, 1), *weights, h0)[0].swapaxes(0, 1)

        def grucell(self, x: Any, h: Any, *weights: Any) -> Any:
            return fr.gru(x[None], *weights, h)[1]

    class ByLayers(g2p.G2p):
        """A sequence and a step are each a call of a layer, which keeps packed weights."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = self.layer("enc"), self.layer("dec")

        def layer(self, part: str) -> fr.GRU:
            gru = fr.GRU(256, 256)
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(gru, f"{kind}_l0", getattr(self, f"{part}_{kind[0]}{kind[-3:]}"))
            return gru

        def gru(self, x: Any, steps: int, *weights: Any, h0: Any) -> Any:
            return self.encoder(x.swapaxes(0, 1))[0].swapaxes(0, 1)

        def grucell(self, x: Any, h: Any, *weights: Any) -> Any:
            return self.decoder(x[None], h[None])[0][0]

    def say(model: Any) -> list[list[str]]:
        return [model.predict(word) for word in words]

    def encode(model: Any) -> Any:
        """Return the encoder's output for the first word."""
        weights = [getattr(model, f"enc_{kind}") for kind in ("w_ih", "w_hh", "b_ih", "b_hh")]
        x = model.encode(words[0])
        return model.gru(x, x.shape[1], *weights, h0=start)

    words = WORDS[:2] if short else WORDS
    own = g2p.G2p()
    start = own.enc_emb[:1] * 0
    for name, kind, lines in (("`fr.gru`", ByFunctions, 5), ("`fr.GRU`", ByLayers, 13)):
        ours = kind()
        if say(own) != say(ours):
            raise SystemExit(f"g2p_en: the pronunciation by {name} differs")
        yield Case(
            f"{len(words)} unknown words, {name}",
            lines,
            difference(encode(ours), encode(own)),
            Pair(lambda: say(own), lambda m=ours: say(m)),
            Pair(lambda: encode(own), lambda m=ours: encode(m)),
        )


if __name__ == "__main__":
    main(__doc__, {CHINESE: chinese, ENGLISH: english})
