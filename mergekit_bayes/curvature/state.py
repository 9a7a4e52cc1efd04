"""All that a pass has added up at a moment, on one rank; it can be saved, and gone on from."""

from base64 import b64decode, b64encode
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_bayes.curvature.parts import AGAIN, Parts
from mergekit_bayes.curvature.stability import Part, Subsamples
from mergekit_bayes.curvature.sums import Keeping, Sums
from mergekit_bayes.libraries import call

_TOTAL, _COPY = "total ", "copy "  # before the name of a parameter; of a copy, a number follows


class State:
    """The state of a pass.

    Args:
        parameters: The parameters, by name.
        keep: How the sums are kept.
        generator: Generator of what the pass draws.

    Attributes:
        sums: The sums.
        subsamples: Their copies, for the stability.
        observations: Number of observations of this rank so far.
        rounds: Number of rounds so far, in each of which every rank takes a batch.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], keep: Keeping, generator: torch.Generator
    ) -> None:
        self.sums, self.subsamples = Sums(parameters, keep), Subsamples()
        self.observations = self.rounds = 0
        self._generator = generator

    def after_round(self, observations: int) -> None:
        """Count a round.

        Args:
            observations: Those of this rank's batch.
        """
        self.observations += observations
        self.rounds += 1
        self.subsamples.after_batch(self.sums.by_row(), self.observations)

    def save_if_due(self, parts: Parts) -> None:
        """Save it as a part, if it is time for one."""
        copies = self.subsamples.copies
        tensors = {_TOTAL + name: total for name, total in self.sums.totals.items()}
        for i, copy in enumerate(copies):
            tensors |= {f"{_COPY}{i} {name}": rows for name, rows in copy.rows.items()}
        numbers = {
            "rounds": self.rounds,
            "observations": self.observations,
            "copies": [copy.observations for copy in copies],
            "stride": self.subsamples.stride,
            "batches": self.subsamples.batches,
            "generator": b64encode(bytes(self._generator.get_state().tolist())).decode(),
        }
        parts.save_if_due(self.rounds, tensors, numbers)

    def restore(self, parts: Parts) -> None:
        """Become the state that was saved last, if there is one.

        Raises:
            CheckpointError: It cannot be read.
        """
        found = parts.restore({_TOTAL + n: total for n, total in self.sums.totals.items()})
        if found is None:
            return
        tensors, numbers = found

        def become() -> None:
            self.rounds, self.observations = int(numbers["rounds"]), int(numbers["observations"])
            self.subsamples.copies = [
                Part({n: tensors[f"{_COPY}{i} {n}"] for n in self.sums.totals}, int(count))
                for i, count in enumerate(numbers["copies"])
            ]
            self.subsamples.stride = int(numbers["stride"])
            self.subsamples.batches = int(numbers["batches"])
            state = torch.tensor(list(b64decode(numbers["generator"])), dtype=torch.uint8)
            self._generator.set_state(state)

        call("the saved state of the estimate cannot be used", become, AGAIN)
