"""Settings of `bmerge precision`, and its report."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from mergekit_bayes.configs import Config
from mergekit_bayes.models.columns import (
    CompletionColumn,
    MessagesColumn,
    PromptColumn,
    TextColumn,
)
from mergekit_bayes.models.load import Dtype, Task
from mergekit_bayes.posterior.info import Pool
from mergekit_bayes.records import Force, Frozen, TrustRemoteCode

EstimatorName: TypeAlias = Literal[
    "ggn", "fisher", "fisher-exact", "fisher-empirical", "ivon", "inputs", "kronecker", "adam"
]


_MOST_MADE = 10**9  # tokens or texts that are made and held in memory
_MOST_COUNTED = 10**15  # observations; times those of a step, they leave float32 room
_LARGEST_PRIOR = 1e30  # likewise


class PrecisionConfig(Config):
    """Settings of one estimate of a precision: the flags of `bmerge precision`.

    The default is `ggn`, one number an entry: removals keep more by entries, and sampling and
    adaptations need numbers. Where tasks are added with text of each at hand, `inputs` and
    `kronecker` had the lower loss in every run so far (`docs/choosing.md`); a merge takes the form
    that is stored. No form was best in all of them.
    """

    model: str = Field(description="A model folder, or a Hub id (which needs -o).")
    data: str | tuple[str, ...] | None = Field(
        None,
        description="What the precision stands for: a file, folder or Hub data set; repeatable. "
        "Any text will do for a model whose own data are not at hand, and needs no labels.",
    )
    self_generated: int | None = Field(
        None,
        ge=1,
        le=_MOST_MADE,
        description="Instead of data: this many texts that a causal language model writes itself, "
        "at temperature 1, of at most `max_length` tokens.",
    )
    keep_generated: str | None = Field(
        None, description="File in which those texts are kept, as JSON lines for --data."
    )
    random_tokens: int | None = Field(
        None,
        ge=1,
        le=_MOST_MADE,
        description="Instead of data: this many uniform tokens, in rows of `max_length`. Cheap, "
        "and far from text.",
    )
    estimator: EstimatorName = Field(
        "ggn",
        description="ggn (random root-GGN), fisher (labels sampled from the model), fisher-exact "
        "(at most 64 outputs), fisher-empirical (labels of the data), ivon (noise on the "
        "weights, labels of the data), inputs (a matrix for each linear layer, the covariance of "
        "its inputs), kronecker (that, and one of its output gradients), or adam (with --from). "
        "A merge wants one estimator for all models.",
    )
    blocks: int = Field(
        1,
        ge=1,
        description="With --estimator inputs: keep this many blocks on the diagonal of each "
        "layer's matrix, which takes 4 d^2 / blocks bytes for d inputs; all models of a merge "
        "need the same.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="With --estimator inputs, in place of --blocks: of the matrix of a layer with "
        "more than twice as many inputs keep the diagonal and this many directions, which take "
        "4 (rank + 1) d bytes for d inputs. Models of a merge may have others, or full matrices.",
    )
    moments: str | None = Field(
        None,
        description="Take it from Adam's second moments instead, as a training left them: "
        "optimizer.pt, a folder of torch.distributed.checkpoint, exp_avg_sq.safetensors, or the "
        "checkpoint that holds one of them.",
    )
    observations: int | None = Field(
        None,
        ge=1,
        le=_MOST_COUNTED,
        description="With --from: tokens or rows of all the training's data.",
    )
    batch_observations: int | None = Field(
        None,
        ge=1,
        description="With --from: tokens or rows of one optimizer step, over accumulation and "
        "processes.",
    )
    step: int | None = Field(
        None, ge=1, description="With --from: optimizer steps, where the file does not say."
    )
    beta2: float | None = Field(
        None, ge=0, lt=1, description="With --from: Adam's beta2, where the file does not say."
    )
    output: str | None = Field(
        None, description="A folder or .posterior file; by default MODEL/posterior."
    )
    where: dict[str, Any] | None = Field(
        None, description="COLUMN=VALUE: keep the rows with this value; repeatable."
    )
    text_column: TextColumn = None
    messages_column: MessagesColumn = None
    prompt_column: PromptColumn = None
    completion_column: CompletionColumn = None
    label_column: str = Field(
        "label",
        description="Column of a classifier's label, which only fisher-empirical and ivon look at.",
    )
    examples: int = Field(2000, ge=1, description="Number of rows to look at, drawn at random.")
    batch_size: int = Field(
        4,
        ge=1,
        description="Rows in one backward pass; smaller batches give more draws from the same "
        "data.",
    )
    max_length: int = Field(512, ge=2, description="Tokens of a row at most.")
    pool: Pool | None = Field(
        None,
        description="tensor or row: keep the mean of each tensor or row in place of its entries, "
        "so that the sums take kilobytes. row-column: store two vectors a matrix, whose product "
        "has the sums of its rows and columns.",
    )
    sums: Literal["device", "cpu", "disk"] = Field(
        "device",
        description="Where the sums lie meanwhile, 4 bytes an entry: device, cpu (in memory) or "
        "disk (in a file beside the output).",
    )
    prior: float = Field(
        0.0,
        ge=0,
        le=_LARGEST_PRIOR,
        description="Isotropic prior precision to include, 1/weight^2.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of the choice of rows, of what the estimator draws, and of tokens and "
        "texts instead of data.",
    )
    task: Task = Field("auto", description="auto, causal-lm or classification.")
    resume: bool = Field(
        False,
        description="Go on with an estimate that was stopped, from the last state that it saved.",
    )
    save_every: float = Field(
        600.0,
        ge=0,
        description="Seconds between two saved states, in OUT.partial; each takes what the sums "
        "take.",
    )
    num_processes: int | None = Field(
        None,
        ge=1,
        description="Number of processes, which share the rows, on a GPU each, or on the CPU's "
        "cores. The draws are those of one process; the sums differ by their rounding in float32. "
        "Under a launcher there must be this number.",
    )
    device: str | None = Field(
        None,
        description="cpu, cuda, cuda:N or mps; by default a GPU where there is one; auto spreads a "
        "model over all GPUs, or over all processes where there are several.",
    )
    dtype: Dtype = "float32"
    trust_remote_code: TrustRemoteCode = False
    force: Force = False


class LayerStability(Frozen):
    """How far the curvature of a layer would move with other examples.

    Attributes:
        name: Common start of the tensors' names, or `embeddings`, `rest`, `head`.
        relative_error: Standard error of a row's curvature over the curvature, root mean square;
            `curvature.stability` has the equation.
        rank_correlation: Spearman's, of the rows of a tensor between two halves of the examples;
            None where no tensor has eight rows.
    """

    name: str
    relative_error: float
    rank_correlation: float | None


class Stability(Frozen):
    """How far the curvature would move with other examples, from disjoint subsamples of them.

    Attributes:
        relative_error: As that of a layer, over the whole model.
        rank_correlation: Likewise.
        layers: The layers that have curvature, in order.
        more_examples: How many more examples would halve the error.
    """

    relative_error: float
    rank_correlation: float | None
    layers: tuple[LayerStability, ...]
    more_examples: int


class PrecisionReport(Frozen):
    """Where the precision was written, and what it stands for.

    Attributes:
        path: The precision's folder or file.
        estimator: Name of the estimator.
        unit: What an observation is: a token or an example.
        loss: The loss whose curvature it is, and what says so.
        observations: Number of observations that the precision stands for.
        source: What the rows are: `data`, `self-generated` or `random-tokens`; without rows
            `moments`.
        rows: Number of rows in the source; None without data, as the next three.
        sampled: Number of rows that were looked at.
        device: Where the model ran.
        dtype: Type of its parameters meanwhile; sums and the precision are float32.
        health: Statistics of the precision.
        step: Optimizer steps in the second moments; None for an estimate from data.
        notes: What may make the precision other than it should be.
        stability: How far it would move with other examples; None for fewer batches than
            subsamples, and for `ivon` and `adam`, which keep none.
    """

    path: Path
    estimator: str
    unit: str
    loss: str
    observations: int
    source: str
    rows: int | None
    sampled: int | None
    device: str | None
    dtype: str | None
    health: dict[str, float]
    step: int | None = None
    notes: tuple[str, ...] = ()
    stability: Stability | None = None
