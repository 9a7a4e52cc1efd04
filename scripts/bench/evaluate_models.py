"""The workloads of the evaluation benchmark, and models of random weights with texts for them."""

from typing import NamedTuple

EACH = 16  # continuations of a prompt
SHAPES: dict[str, dict[str, int]] = {
    "2": {"vocab_size": 4096, "n_positions": 128, "n_embd": 192, "n_layer": 3, "n_head": 4},
    "124": {"vocab_size": 50257, "n_positions": 512, "n_embd": 768, "n_layer": 12, "n_head": 12},
}
PEAKED = {"2": 10.0, "124": 8.0}  # factors of the last norm's weights


class Workload(NamedTuple):
    """One line of the table: what both sides do."""

    task: str  # sample or perplexity
    kind: str  # the prompts, or the order of lm-eval's texts
    batch: int
    items: int  # prompts, or documents

    @property
    def continuations(self) -> int:
        """Of each prompt; a batch of one continues fewer."""
        return EACH if self.batch > 1 else 4


class Models:
    """The model of a size, its tokenizer, and texts for it."""

    def __init__(self, size: str) -> None:
        """Make a model of random weights and a tokenizer of numbered words."""
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        self.shape, self.size = SHAPES[size], size
        torch.manual_seed(0)
        config = GPT2Config(**self.shape, bos_token_id=None, eos_token_id=None)
        self.model = GPT2LMHeadModel(config).eval()
        self.factor = 1.0
        count = self.shape["vocab_size"]
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")

    def scale(self, kind: str) -> None:
        """Scale the last norm for "peaked" next-token distributions, and back."""
        import torch

        factor = PEAKED[self.size] if kind == "peaked" else 1.0
        with torch.no_grad():
            self.model.transformer.ln_f.weight.mul_(factor / self.factor)
        self.factor = factor

    def texts(self, lengths: list[int]) -> list[str]:
        """Random words."""
        import numpy as np

        rng = np.random.default_rng(len(lengths))
        return [
            " ".join(f"w{i}" for i in rng.integers(1, self.shape["vocab_size"], n)) for n in lengths
        ]

    def prompts(self, workload: Workload) -> list[str]:
        """Prompts of one length, or of 4 to 18 words."""
        import numpy as np

        rng = np.random.default_rng(0)
        mixed = rng.integers(4, 19, workload.items).tolist()
        return self.texts([11] * workload.items if workload.kind == "equal" else mixed)

    def documents(self, workload: Workload) -> list[str]:
        """Documents of 10 to 400 words, half of them below 64."""
        import numpy as np

        rng = np.random.default_rng(1)
        return self.texts(np.exp(rng.uniform(np.log(10), np.log(400), workload.items)).astype(int))
