"""Settings of `bmerge finetune`, and its report."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from mergekit_bayes.configs import Config
from mergekit_bayes.models.columns import (
    Columns,
    CompletionColumn,
    MessagesColumn,
    PromptColumn,
    TextColumn,
)
from mergekit_bayes.models.load import Task
from mergekit_bayes.records import Force, Frozen, TrustRemoteCode


def say_what_pack_was(value: object) -> object:
    """Refuse `pack: true` of earlier configs, which does not say how rows are packed.

    Raises:
        ValueError: It is true.
    """
    if value is True:
        raise ValueError(
            "true no longer says how rows are packed. Write joined for what it was: rows joined by "
            "EOS, each of which sees those before it. In a fine-tune, documents keeps rows apart."
        )
    return value


class LoraSettings(Config):
    """Settings of low-rank adaptation, as peft takes them."""

    r: int = Field(8, description="Rank of the factors.")
    alpha: float = Field(16.0, description="The factors' product is scaled by `alpha / r`.")
    dropout: float = Field(0.0, description="Dropout before the first factor.")
    target_modules: tuple[str, ...] | str | None = Field(
        None, description="Modules to adapt; by default those that peft chooses for the model."
    )


class DataSource(Config):
    """One source of rows and how often a pass over the data draws them."""

    path: str = Field(description="A file, folder or Hub data set.")
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often a pass draws each row: 2 is twice, 0.5 half of the rows, the same "
        "ones in each pass. A row counts as often in the posterior.",
    )

    @model_validator(mode="before")
    @classmethod
    def _named_alone(cls, values: Any) -> Any:
        """The name of a source alone stands for one that is drawn once."""
        return {"path": str(values)} if isinstance(values, (str, Path)) else values

    @model_serializer
    def _as_written(self) -> str | dict[str, str | float]:
        return self.path if self.weight == 1 else {"path": self.path, "weight": self.weight}


class FinetuneConfig(Config):
    """Settings of one fine-tune: the YAML keys of `bmerge finetune`.

    `docs/finetuning.md` says how to choose them. The defaults of `curvature`, `curvature_every`,
    `posterior`, `ess` and `learning_rate` follow the measurements in `docs/experiments.md`.
    """

    model: str = Field(description="Model to train: a folder or Hub id.")
    output: str = Field(description="Folder to write.")
    data: tuple[DataSource, ...] = Field(
        min_length=1,
        description="Rows: a file, folder or Hub data set, or a list of them, each of which may be "
        "`{path: ..., weight: ...}`.",
    )
    where: dict[str, Any] | None = Field(
        None, description="Keep only the rows with these values, `{column: value}`."
    )
    text_column: TextColumn = None
    messages_column: MessagesColumn = None
    prompt_column: PromptColumn = None
    completion_column: CompletionColumn = None
    chat_template: str | None = Field(
        None,
        description="File with a Jinja template for conversations, instead of the tokenizer's own; "
        "it is stored with the tokenizer.",
    )
    label_column: str = Field("label", description="Column of the label.")
    max_rows: int | None = Field(None, ge=1, description="Number of rows at most, from the front.")
    task: Task = Field(
        "auto",
        description="`causal-lm`, `classification`, or `auto` for what the architecture says.",
    )
    num_labels: int | None = Field(
        None,
        ge=2,
        le=1_000_000,
        description="Number of classes; makes a new head for a classifier.",
    )
    max_length: int = Field(
        512, ge=2, description="Tokens of a row at most; no more than the model's context."
    )
    pack: Annotated[Literal[False, "documents", "joined"], BeforeValidator(say_what_pack_was)] = (
        Field(
            False,
            description="Language models: instead of one row an example, `documents` puts several "
            "into `max_length` tokens and keeps them apart, with the loss of unpacked rows; "
            "`joined` joins texts by EOS and cuts blocks, in which a text sees those before it.",
        )
    )
    eval_data: str | tuple[str, ...] | None = Field(
        None,
        description="Held-out rows, read like `data` and without `max_rows`: their loss and "
        "perplexity, or accuracy, are logged during training.",
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Steps from one evaluation to the next; by default `save_steps`, or else "
        "`logging_steps`. The end is evaluated always.",
    )
    load_best: bool = Field(
        False,
        description="Store the model and the posterior of the checkpoint with the lowest loss on "
        "`eval_data`. Needs `save_steps`.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop when this number of evaluations in a row had no lower loss than the best "
        "one before.",
    )
    optimizer: Literal["ivon", "adamw"] = Field("ivon", description="`ivon` or `adamw`.")
    learning_rate: float | None = Field(
        None,
        ge=0,
        description="By default 1e-4, and 1e-3 for an adapter; for IVON on a classifier of more "
        "than 100 steps this times 100 / steps, down to a tenth. For IVON the bound on the change "
        "of a weight in one step, its `lr` times `clip_radius`, and at most 0.01.",
    )
    ess: float | None = Field(
        None,
        gt=0,
        description="Effective sample size, which scales IVON's noise. By default the number of "
        "observations, and at least 1e6 (`ggn`); under `price`, or with a `damping` that is given, "
        "more where the noise of an entry at the start, or without curvature, would exceed 5 % of "
        "the median weight matrix' RMS.",
    )
    hess_init: float = Field(
        0.01, gt=0, description="Start value of IVON's Hessian; `ggn` starts from its first draw."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Memory of the gradient.")
    beta2: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Memory of the Hessian. By default 1 - 5 `curvature_every` / steps with `ggn`, "
        "but at least 0.5, and 1 - 5 / steps with `price`, but at least 0.9; at most 0.99999.",
    )
    weight_decay: float = Field(
        1e-6,
        ge=0,
        description="IVON: prior precision over `ess`, which `ggn` needs above 0. AdamW: decoupled "
        "weight decay, which is no Gaussian prior.",
    )
    clip_radius: float = Field(
        1e-3,
        gt=0,
        description="Bound on each entry of IVON's preconditioned direction: a weight whose entry "
        "reaches it moves by all of `learning_rate`, another one by less.",
    )
    rescale_lr: bool = Field(
        False,
        description="IVON multiplies its `lr` by `hess_init + weight_decay`, as published. The "
        "steps stay the same, because `learning_rate` bounds them: only `lr` in the record grows.",
    )
    mc_samples: int = Field(
        1, ge=1, description="Weight samples a step, each a forward and a backward pass."
    )
    antithetic: bool = Field(
        False, description="Draw samples in pairs of opposite noise, so at least two a step."
    )
    rank_noise: bool = Field(
        False,
        description="With several processes: draw different noise in each, so that one sample a "
        "process becomes as many samples as processes. Otherwise all draw the same.",
    )
    curvature: Literal["price", "ggn"] = Field(
        "ggn",
        description="Where IVON's Hessian comes from: `ggn`, a random root-GGN draw on the step's "
        "own logits every `curvature_every` steps, or `price`, the published estimate from noise "
        "times gradient.",
    )
    curvature_every: int = Field(
        8, ge=1, description="Steps from one draw of `ggn` to the next, a backward pass each."
    )
    posterior: Literal["flush", "ivon", "none"] = Field(
        "flush",
        description="What is stored: `flush` (root-GGN at the final mean over `flush_batches` "
        "batches), `ivon` (the optimizer's Hessian) or `none`.",
    )
    flush_batches: int = Field(64, ge=1, description="Batches of the flush.")
    damping: float | None = Field(
        None,
        ge=0,
        description="Added to the Hessian of `ggn`, where it bounds the noise of every weight by "
        "`1 / sqrt(ess damping)`. It is no prior: it pulls nothing and is not in the stored "
        "precision, but in the width of the draws. By default what makes this bound 15 % of the "
        "median weight matrix' RMS.",
    )
    lora: LoraSettings | None = Field(
        None, description="Train a low-rank adapter with these settings instead of all weights."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, description="Number of steps; takes precedence over `epochs`."
    )
    batch_size: int = Field(8, ge=1, description="Examples in one pass of one process.")
    gradient_accumulation: int = Field(1, ge=1, description="Passes a step.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    scheduler: str = Field(
        "linear", description="Schedule of the learning rate, by its name in transformers."
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the order of the data and of all noise."
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="Dtype of the parameters: `float32`, `bfloat16`, or `auto` for the file's. "
        "IVON's state is always float32.",
    )
    bf16: bool = Field(
        False, description="Compute in bfloat16, with parameters in their own dtype."
    )
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(
        None, description="Attention by its name in transformers; by default what it chooses."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )
    torch_compile: bool = Field(False, description="Compile the model with torch.compile.")
    logging_steps: int = Field(50, ge=1, description="Steps from one line of the log to the next.")
    save_steps: int | None = Field(
        None,
        ge=1,
        description="Steps from one checkpoint in `OUTPUT.checkpoints` to the next; by default no "
        "checkpoints. They are removed when the model is stored.",
    )
    keep_checkpoints: bool = Field(
        False,
        description="Keep the checkpoints of `save_steps` when the model is stored, so that "
        "`resume` and `force` can store another `posterior` of it.",
    )
    resume: bool = Field(
        False,
        description="Continue from the newest complete checkpoint in OUTPUT.checkpoints, or start "
        "where there is none. Settings that training depends on must be the same.",
    )
    num_processes: int | None = Field(
        None,
        ge=1,
        description="Number of processes, which train replicas on a GPU each, or on the CPU's "
        "cores. Under a launcher there must be this number.",
    )
    shard: bool = Field(
        False,
        description="With several processes, on a GPU each: give each a part of every tensor of "
        "model and optimizer (FSDP2) in place of a replica, for a model that one device cannot "
        "hold.",
    )
    report_to: tuple[str, ...] = Field(
        (),
        description="Where to report the loss and the posterior's health, by the names of "
        "transformers: `tensorboard`, `wandb` and so on, or a list of them. Files that this makes "
        "are in `OUTPUT.checkpoints` during training and in `OUTPUT/runs` at the end.",
    )
    trust_remote_code: TrustRemoteCode = False
    force: Force = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the training data come from."""
        return tuple(source.path for source in self.data)

    @property
    def eval_sources(self) -> tuple[str, ...]:
        """The sources of the held-out data; none without any."""
        return (self.eval_data,) if isinstance(self.eval_data, str) else self.eval_data or ()

    @property
    def columns(self) -> Columns:
        """The columns that are named."""
        return Columns(
            self.text_column, self.messages_column, self.prompt_column, self.completion_column
        )

    @property
    def evaluates_every(self) -> int:
        """Steps from one evaluation to the next, where there is held-out data."""
        return self.eval_steps or self.save_steps or self.logging_steps


class FinetuneReport(Frozen):
    """What a fine-tune produced.

    Attributes:
        path: The folder that was written.
        steps: Number of steps.
        loss: Mean training loss over the steps.
        observations: Number of observations in the data.
        unit: What an observation is: a token or an example.
        estimator: What made the precision; None if none was stored.
        health: Statistics of the posterior and of the training noise.
        evaluation: `loss` and `perplexity`, or `accuracy`, of the stored model on `eval_data`.
        best_step: Step of the stored checkpoint where `load_best` chose it.
    """

    path: Path
    steps: int
    loss: float
    observations: int
    unit: str
    estimator: str | None
    health: dict[str, float]
    evaluation: dict[str, float] = {}
    best_step: int | None = None
