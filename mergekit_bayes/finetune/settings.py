"""What a fine-tune may be told, and what it reports."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mergekit_bayes.models.load import Task
from mergekit_bayes.records import Config


class LoraSettings(Config):
    """Low-rank adaptation, as peft takes it."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None


class FinetuneConfig(Config):
    """Settings of `bmerge finetune`; the fields are the YAML keys.

    The defaults of `curvature`, `curvature_every`, `posterior`, `ess` and `learning_rate` follow
    the tables of `scripts/experiments/posterior_quality.py` in docs/experiments.md.

    Attributes:
        model, output: A folder or Hub id, and the folder to write.
        data: Files, folders or Hub data sets of rows; `where` keeps rows with these values.
        task: `auto` reads it off the architecture; `num_labels` makes a new head for a classifier.
        pack: For language models: join rows by EOS and cut blocks, instead of one row an example.
        learning_rate: None is 0.1 for IVON (with `clip_radius` 1e-3 and no rescaling no weight
            moves further than 1e-4 a step, a usual AdamW rate), 1e-4 for AdamW; ten times that for
            an adapter, whose factors start far from where they end.
        ess: Effective sample size. None is the data's size, but at least so large that the noise of
            an entry at the start (`price`) or without curvature (`ggn`) is 5 % of the median weight
            matrix' RMS. The data's size itself ruined short runs with either (accuracy 0.50 to 0.61
            where 1e7 gave 0.77 to 0.81).
        hess_init: Start value of h; `ggn` starts from its first draw instead.
        beta2: None is 1 - 5 / steps (1 - 5 curvature_every / steps under `ggn`).
        mc_samples: Weight samples a step, each a forward and a backward pass.
        antithetic: Samples in pairs of opposite noise, so at least two a step.
        rank_noise: With several processes, IVON noise of its own in each, for its own part of the
            batch: as many samples as processes at the cost of one. Else all draw the same.
        curvature: Where IVON's Hessian comes from: `ggn`, a random root-GGN draw on the step's own
            logits every `curvature_every` steps, a backward pass each (at 8 a twelfth of a step),
            or `price` as published. In 480 passes on a small classifier the median ratio to the
            exact diagonal was 0.86 with `ggn` at 8 and 640 with `price`; of a whole fine-tune
            held-out loss was the same or lower than with `price` and with AdamW.
        weight_decay: For IVON the prior precision over ess, above 0 with `ggn`. AdamW's is
            decoupled and no Gaussian prior.
        posterior: `flush` (root-GGN at the final mean over `flush_batches` batches: a ratio of 0.9
            to 1.0 after any of the optimizers, also where a run has learnt its data by heart and h
            is 300 times too large), `ivon`, or `none`.
        epochs, max_steps: `max_steps`, if given, decides.
        scheduler: As transformers names it.
        dtype: Of the parameters; IVON's own state is float32 whatever it is. `bf16` only computes
            in bfloat16.
        save_steps: None keeps no checkpoints; else the Trainer's are kept in `OUTPUT.checkpoints`.
        resume: Continue from the newest whole checkpoint there, to the same bits as a run that was
            never stopped, or start from the first step where there is none. All settings that
            training depends on must be the same.
        num_processes: How many there must be; `bmerge finetune` starts them where no launcher has.
        report_to: `tensorboard`, `wandb` and so on, as transformers names them; loss and posterior
            health go there.
    """

    model: str
    output: str
    data: str | tuple[str, ...]
    where: dict[str, Any] | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_rows: int | None = Field(None, ge=1)
    task: Task = "auto"
    num_labels: int | None = Field(None, ge=2)
    max_length: int = Field(512, ge=2)
    pack: bool = False
    optimizer: Literal["ivon", "adamw"] = "ivon"
    learning_rate: float | None = Field(None, ge=0)
    ess: float | None = Field(None, gt=0)
    hess_init: float = Field(0.01, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float | None = Field(None, ge=0, lt=1)
    weight_decay: float = Field(1e-6, ge=0)
    clip_radius: float = Field(1e-3, gt=0)
    rescale_lr: bool = False
    mc_samples: int = Field(1, ge=1)
    antithetic: bool = False
    rank_noise: bool = False
    curvature: Literal["price", "ggn"] = "ggn"
    curvature_every: int = Field(8, ge=1)
    posterior: Literal["flush", "ivon", "none"] = "flush"
    flush_batches: int = Field(64, ge=1)
    lora: LoraSettings | None = None
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    warmup_steps: int = Field(0, ge=0)
    scheduler: str = "linear"
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    bf16: bool = False
    logging_steps: int = Field(50, ge=1)
    save_steps: int | None = Field(None, ge=1)
    resume: bool = False
    num_processes: int | None = Field(None, ge=1)
    report_to: tuple[str, ...] = ()
    force: bool = False


class FinetuneReport(Config):
    """What a fine-tune left: where, how long it trained, and the posterior's health."""

    path: Path
    steps: int
    loss: float
    observations: int
    unit: str
    estimator: str | None
    health: dict[str, float]
