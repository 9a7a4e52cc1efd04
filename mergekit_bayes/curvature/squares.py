"""One pass over batches that adds up squared gradients, which most estimators of curvature share.

Such an estimator differs from others in the vectors v that it puts in front of the logits z of a
batch's n observations. With J_n the Jacobian of z_n in the weights, each of them adds

    ( sum_n J_n' v_n )^2        entry by entry, one backward pass

to the diagonal. If the v_n of one batch are uncorrelated with mean zero, the cross terms of
observations vanish, and the expectation is the diagonal of `sum_n J_n' E[v_n v_n'] J_n` at any
batch size.

The same holds for the batches of different ranks where the parameters are sharded over them
(`shards`): their gradients are added up before they are squared.

Each gradient is squared, added and freed as soon as the backward pass has made it, so that no more
than one is there at a time, and the model's size counts once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import backward
from torch.autograd.graph import get_gradient_edge
from torch.nn import Module

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.outputs import (
    TrainedLoss,
    numbers,
    scored_logits,
    scored_targets,
    trained_loss,
)
from mergekit_bayes.curvature.refusals import explained, refuse_offloaded
from mergekit_bayes.curvature.shards import gather_parts, gather_sums, local, whole_sums
from mergekit_bayes.curvature.state import State
from mergekit_bayes.curvature.sums import ENTRIES, Keeping, Sums
from mergekit_bayes.libraries import outputs_of
from mergekit_bayes.ranks import gather, in_step, or_end, own_number, world

_Batch: TypeAlias = Mapping[str, Tensor]


class Scored(NamedTuple):
    """The logits of a batch that the loss looks at, as an estimator sees them.

    Attributes:
        logits: z, shape (n, C), float32, without a graph.
        loss: The loss that the model trains with.
        generator: Generator of whatever is drawn, on the device of the logits.
        targets: Observed labels: class numbers (n,), or numbers (n, C); None without labels.
    """

    logits: Tensor
    loss: TrainedLoss
    generator: torch.Generator
    targets: Tensor | None = None


# The vectors v, (n, C) each, one backward pass for each of them. How many random numbers are drawn
# must follow from the shape of the logits alone, so that other ranks can skip them. Where
# parameters are sharded, there must be as many vectors for any batch: ranks make passes together.
Roots = Callable[[Scored], Iterable[Tensor]]


class Beside(Protocol):
    """What else is added up in the same pass, for parameters that require no gradient meanwhile.

    Attributes:
        parameters: Those parameters, by name.
    """

    parameters: Mapping[str, Tensor]

    def adding(self, sums: Sums) -> AbstractContextManager[None]:
        """Inside, the forward passes add to their sums."""
        ...


def squared_gradients(
    model: Module,
    batches: Iterable[Mapping[str, Tensor]],
    roots: Roots,
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
    beside: Beside | None = None,
) -> Curvature:
    """Add up `(grad sum_n <v_n, z_n>)^2` over batches, at the model's weights.

    Args:
        model: A model of tokens if batches hold `labels` of the inputs' shape (a causal one is
            scored where the next label is not -100, a masked one or a classifier of tokens where
            the label itself is not), else a classifier. Dropout is off meanwhile.
        batches: Mappings with `input_ids`, `attention_mask` and, for models of tokens, `labels`.
            Other labels say by their dtype which loss a classifier without `problem_type` trains
            with, and are what `roots` sees as `Scored.targets`.
        roots: The vectors v of a batch.
        seed: Seed of the generator that `roots` draws from.
        keep: How finely the sums are kept, and where.
        beside: What else is added up.

    Returns:
        Tensors for every parameter that requires a gradient; tied parameters once.

    Raises:
        CheckpointError: The model's outputs are not numbers; or a part cannot be written or read.
        ConfigError: The part that was saved is of another pass; the memory does not suffice; the
            model is offloaded, or checkpoints activations in the reentrant way. Where parameters
            are sharded, such an error in a batch is printed, and ends the process.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    beside_parameters = beside.parameters if beside is not None else {}
    added = {**parameters, **beside_parameters}
    refuse_offloaded(added)
    is_sharded = keep.is_sharded
    here = {n: local(p) for n, p in added.items()} if is_sharded else added
    generator = torch.Generator(next(iter(here.values())).device).manual_seed(seed)
    own, was_training = _Pass(model, roots, generator, is_sharded), model.training
    rank, ranks = (own_number(), world()) if keep.is_shared else (0, 1)
    begin = explained()(partial(State, here, keep, generator))
    state = in_step(begin) if ranks > 1 else begin()
    is_gathered = is_sharded and keep.is_gathered
    whole = in_step(partial(whole_sums, parameters, keep)) if is_gathered else {}

    def add(name: str, gradient: Tensor) -> None:
        state.sums.add(name, local(gradient) if is_sharded else gradient)

    if keep.parts is not None:
        state.restore(keep.parts)
    model.eval()
    try:
        with (
            _handed_over(parameters, add),
            nullcontext() if beside is None else beside.adding(state.sums),
        ):
            for together in islice(_by_round(batches, ranks), state.rounds, None):
                step = partial(own.add, together, rank)
                if is_sharded:
                    state.after_round(sum(gather(or_end(step))))
                else:
                    state.after_round(in_step(step) if ranks > 1 else step())
                if keep.parts is not None:
                    state.save_if_due(keep.parts)
    finally:
        model.train(was_training)
    observations, parts = state.observations, state.subsamples.parts()
    if is_gathered:
        or_end(partial(gather_sums, state.sums.totals, whole))
        return Curvature(whole, observations, gather_parts(parts))
    if is_sharded:
        return Curvature(state.sums.totals, observations, parts)
    if ranks > 1:
        state.sums.add_over_ranks()
        counted = gather((observations, parts))
        observations = sum(count for count, _ in counted)
        parts = tuple(part for _, own_parts in counted for part in own_parts)
    return Curvature(state.sums.totals, observations, parts)


def _by_round(batches: Iterable[_Batch], ranks: int) -> Iterator[list[_Batch]]:
    """One batch for each rank at a time; the last time there may be fewer."""
    remaining = iter(batches)
    while together := list(islice(remaining, ranks)):
        yield together


class _Pass(NamedTuple):
    """One rank's share of a pass: the passes of its own batches, and the draws of all.

    What others draw is drawn here, too, and thrown away, so that each batch gets the random numbers
    that it gets in one process.
    """

    model: Module
    roots: Roots
    generator: torch.Generator
    is_sharded: bool

    @explained()
    def add(self, together: Sequence[_Batch], rank: int) -> int:
        """Run the backward passes of one batch of a round, inside of `_handed_over`.

        Where parameters are sharded, all ranks make the passes, one without a batch with zeros.

        Returns:
            Its number of observations; 0 where there is none for this rank, as in a last round.
        """
        is_idle = rank >= len(together)
        if is_idle and not self.is_sharded:
            return 0
        batch = together[0 if is_idle else rank]
        seen_by_model = {name: v for name, v in batch.items() if name != "labels"}
        outputs = outputs_of(self.model, **seen_by_model).logits
        like = outputs.new_zeros(()).expand(outputs.shape)
        for other in together[:rank]:
            self._skip(like, other)
        logits, seen = self._look(outputs, batch)
        # Sharded parameters are not in the graph: it has whole ones, which are there for a moment.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:  # all that there is to add is beside
            return len(logits)
        inputs = None if self.is_sharded else trained
        observations, edge, dtype = len(logits), get_gradient_edge(logits), logits.dtype
        vectors = (vector.to(dtype) for vector in self.roots(seen))
        # With many tokens to choose from, logits are larger than any parameter. `vectors` needs
        # them until it is at its end, which is looked for before the last pass.
        del outputs, logits, seen
        vector = next(vectors, None)
        while vector is not None:
            following = next(vectors, None)
            vector = torch.zeros_like(vector) if is_idle else vector
            backward(edge, vector, retain_graph=following is not None, inputs=inputs)
            vector = following
        for other in together[rank + 1 :]:
            self._skip(like, other)
        return 0 if is_idle else observations

    def _look(self, outputs: Tensor, batch: _Batch) -> tuple[Tensor, Scored]:
        """The logits of a batch that are scored, with their graph and as an estimator sees them."""
        labels, tokens = batch.get("labels"), batch.get("input_ids")
        loss = trained_loss(self.model, labels)
        logits = scored_logits(outputs, labels, tokens, shifts=loss.shifts)
        targets = scored_targets(outputs, labels, tokens, shifts=loss.shifts)
        return logits, Scored(numbers(logits.detach()).float(), loss, self.generator, targets)

    def _skip(self, like: Tensor, batch: _Batch) -> None:
        """Draw what another rank draws, for logits that are not known here but for their shape."""
        shape = (*batch["input_ids"].shape[: like.ndim - 1], like.shape[-1])
        for _ in self.roots(self._look(like.new_zeros(()).expand(shape), batch)[1]):
            pass


@contextmanager
def _handed_over(
    parameters: Mapping[str, Tensor], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, a backward pass hands each gradient over as soon as it has it, and keeps none.

    A tied parameter is one parameter: its gradient comes once a pass, when all its uses are added
    up. Afterwards the gradients that were there before are there again.
    """

    def hook(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            take(name, parameter.grad)
            parameter.grad = None

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
            handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(hook, name)
            )
            stack.callback(handle.remove)
        yield
