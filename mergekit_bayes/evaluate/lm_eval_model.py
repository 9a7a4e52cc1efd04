"""A loaded model as lm-eval asks it: requests in blocks, which ranks share.

Import this module where lm-eval is known to be installed.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM

from mergekit_bayes.draws import mix
from mergekit_bayes.evaluate.report import StepProgress
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.ranks import spread, world

_BATCHES = 32  # in a block; lm-eval sorts and shares prefixes within one


class Asked(NamedTuple):
    """Requests of one kind, as ranks tell each other of them."""

    kind: str  # the method of lm-eval's model class
    arguments: list[Any]  # of each request; its document stays on the rank that read it


class BlockModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's own model class, with the requests in blocks of equal size.

    A block does not depend on the number of ranks, and what is drawn in it has a seed of its own,
    so that several ranks give what one process does. One rank runs the tasks, and `together` has
    all ranks answer what these ask (`ranks.lead`).

    Args:
        loaded: A causal language model.
        batch_size: Requests in one forward pass.
        seed: Seed of what tasks sample.
        tell: Called with (step, done, of).
    """

    def __init__(self, loaded: Loaded, *, batch_size: int, seed: int, tell: StepProgress) -> None:
        super().__init__(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            max_length=loaded.context,
            batch_size=batch_size,
        )
        self._block = _BATCHES * batch_size
        self._seed, self._blocks = seed, 0
        self._tell = tell
        self._answers: list[Any] = []
        self.together: Callable[[Asked], object] = self.answer

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        """The log likelihood of each continuation, and whether it is the greedy one."""
        return self._asked("loglikelihood", requests)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[Any]:
        """The log likelihood of each text."""
        return self._asked("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        """The text that is written after each context."""
        return self._asked("generate_until", requests)

    def answer(self, asked: Asked) -> None:
        """Answer requests; every rank must call this, and keeps the answers to all of them."""
        requests = [SimpleNamespace(args=arguments) for arguments in asked.arguments]
        answer: Callable[..., list[Any]] = getattr(super(), asked.kind)
        starts = range(0, len(requests), self._block)
        first, done = self._blocks, 0
        self._blocks += len(starts)

        def work(start: int) -> list[Any]:
            nonlocal done
            torch.manual_seed(mix(self._seed, first + start // self._block))
            block = requests[start : start + self._block]
            answers = list(answer(block, disable_tqdm=True))
            done += len(block)
            self._tell("lm-eval", min(done * world(), len(requests)), len(requests))
            return answers

        self._answers = [answer for block in spread(starts, work) for answer in block]

    def _asked(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        self.together(Asked(kind, [request.args for request in requests]))
        return self._answers
