"""Tiny checkpoints and posteriors as files, for tests of the merge."""

from pathlib import Path

import numpy as np

from mergekit_bayes.checkpoint.codec import encode, read_tensor
from mergekit_bayes.checkpoint.layout import (
    POSTERIOR_ENDING,
    checkpoint_files,
    write_precision_index,
)
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.posterior import (
    Anchor,
    PosteriorInfo,
    Prior,
    identify,
    open_posterior,
    save_posterior,
)
from mergekit_bayes.posterior.stored import StoredPrecisions

SHAPES = {"wte.weight": (7, 4), "h.0.attn.weight": (4, 5), "h.0.ln.bias": (4,), "h.0.scalar": ()}


def arrays(seed, shapes=SHAPES, spread=1.0):
    rng = np.random.default_rng(seed)
    return {n: np.asarray(rng.normal(size=s) * spread, np.float32) for n, s in shapes.items()}


def precisions(seed, shapes=SHAPES, low=0.1, high=10.0):
    rng = np.random.default_rng(seed + 1000)
    return {
        n: np.asarray(np.exp(rng.uniform(np.log(low), np.log(high), s)), np.float32)
        for n, s in shapes.items()
    }


def names_in(path, tensors):
    """Tensors under the names that they have in a file: a precision's begin with its role."""
    is_precision = Path(path).suffix == POSTERIOR_ENDING
    return {f"precision:{n}": t for n, t in tensors.items()} if is_precision else tensors


def write(path, tensors, dtype="F32", metadata=None):
    """A safetensors file by our own sink; its parents are made.

    In one that ends in `.posterior` the tensors are precisions, by the model's names.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = names_in(path, tensors)
    sink = SafetensorsSink(
        path,
        {n: TensorSpec(dtype, t.shape) for n, t in tensors.items()},
        metadata or {"format": "pt"},
    )
    for name, t in tensors.items():
        sink.write_bytes(name, 0, encode(t.reshape(-1), dtype))
    sink.close()
    return path


def posterior(
    path,
    mean,
    precision,
    *,
    observations=100.0,
    ess=None,
    prior=0.0,
    anchor=None,
    estimator="ggn",
    unit="token",
    dtype="F32",
    training=None,
    health=None,
):
    """A model file with this stored precision; `prior` is what it contains, on its own scale."""
    path = write(path, mean, dtype)
    source = SafetensorsSource(checkpoint_files(path))
    info = PosteriorInfo(
        estimator=estimator,
        unit=unit,
        observations=observations,
        ess=ess or observations,
        prior=Prior(kind="isotropic", precision=prior) if prior else Prior(),
        anchor=anchor or Anchor(),
        mean=identify(source),
        training=training or {},
        health=health or {},
    )
    source.close()
    save_posterior(path, precision, info)
    return path


def read_all(source):
    """All tensors of a source, by name."""
    return {name: read_tensor(source, name) for name in source.specs}


def info(model, **changes):
    """A record of a precision of the weights in a file or folder."""
    with SafetensorsSource(checkpoint_files(Path(model))) as source:
        mean = identify(source)
    return PosteriorInfo(
        estimator="ggn", unit="token", observations=100.0, ess=100.0, mean=mean, **changes
    )


def into_folder(path, stem="model"):
    """Move the precision beside a model's file to where that of a folder lies, with its index."""
    place = Path(path) / "posterior"
    place.mkdir(parents=True)
    file = (Path(path) / f"{stem}.posterior").rename(place / "precision.posterior")
    with SafetensorsSource([file]) as source:
        names, size = list(source.specs), sum(spec.nbytes for spec in source.specs.values())
    write_precision_index(place, {file.name: names}, size)


def read(path):
    """All float tensors of a file or folder, as float32 or float64, by the model's names."""
    path = Path(path)
    if path.suffix == POSTERIOR_ENDING:
        source = StoredPrecisions([path])
    else:
        source = SafetensorsSource(checkpoint_files(path))
    found = {
        n: read_tensor(source, n) for n, spec in source.specs.items() if spec.dtype in MERGEABLE
    }
    source.close()
    return found


def read_precision(model, place=None):
    """All tensors of a model's precision, which may be stored elsewhere."""
    with open_posterior(str(model), precision=place and str(place)) as opened:
        return {n: read_tensor(opened.precision, n) for n in opened.precision.specs}


def gaussians(n, shape=(50,), seed=0, above=None):
    """Random Gaussians; with `above`, precisions that exceed that one's."""
    rng = np.random.default_rng(seed)
    floor = above.precision if above is not None else 0.0
    return tuple(
        Gaussian(rng.normal(size=shape), floor + np.exp(rng.normal(size=shape))) for _ in range(n)
    )
