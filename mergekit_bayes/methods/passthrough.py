"""One model as it is, or scaled, as mergekit's recipes mean `passthrough`."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def passthrough(tensors: Tensors) -> Array:
    """Take the model's tensor, times a factor.

        mean = scale m_1

    Source: mergekit's documentation; no paper known. A factor of 1 changes no bit.

    Args:
        tensors: Without a base; one task.
    """
    (task,) = tensors.tasks
    scale = tensors.number("scale")
    return task if scale == 1 else np.asarray(scale * task)


PASSTHROUGH = Method(
    "passthrough",
    by_tensor,
    needs_base=False,
    needs_precision=False,
    summary="One model's tensors as they are, or times a factor.",
    example="bmerge merge recipe.yml -o OUT    # merge_method: passthrough",
    formula="m = scale m_1",
    parameters=(Parameter("scale", 1.0, "what the tensor is multiplied by"),),
    tasks=1,
    takes_scales=False,
    tensor=TensorRule(passthrough, "entries"),
)
