"""Made-up curvature that is built like that of a model."""

import numpy as np

WIDTH, INNER, LAYERS = 64, 96, 3


def curvature(seed=0, *, biases=True, noise=0.3):
    """The curvature of a model of linear layers: outer products, and biases that share a factor."""
    rng = np.random.default_rng(seed)

    def factor(n):
        return np.exp(rng.normal(size=n))

    stream, gradient = factor(WIDTH), factor(WIDTH)  # of the residual stream
    tensors = {"wte.weight": np.outer(factor(50) * (rng.random(50) < 0.3), stream)}
    for i in range(LAYERS):
        for name, out, into in (
            ("attn.q", factor(WIDTH), stream),
            ("attn.o", gradient, factor(WIDTH)),
            ("mlp.up", factor(INNER), stream),
            ("mlp.down", gradient, factor(INNER)),
        ):
            tensors[f"h.{i}.{name}.weight"] = np.outer(out, into)
            if biases:
                tensors[f"h.{i}.{name}.bias"] = out.copy()
    return {
        name: (t * np.exp(noise * rng.normal(size=t.shape))).astype(np.float32)
        for name, t in tensors.items()
    }
