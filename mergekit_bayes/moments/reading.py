"""Read second moments from whatever a training has left."""

from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_bayes.checkpoint.moment_files import MomentFiles
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.moments.base import Moments
from mergekit_bayes.moments.shards import read_shards
from mergekit_bayes.moments.state import read_state
from mergekit_bayes.moments.tensors import read_tensors


@contextmanager
def read_moments(files: MomentFiles) -> Iterator[Moments]:
    """The second moments in an optimizer's files, which stay open meanwhile.

    Args:
        files: From `checkpoint.moment_files.find_moments`.

    Raises:
        CheckpointError: The files cannot be read, or are of another optimizer than Adam.
    """
    if files.form == "tensors":
        with SafetensorsSource(files.files) as source:
            yield read_tensors(source, files.path)
    elif files.form == "shards":
        yield read_shards(files.path)
    else:
        yield read_state(files.path)
