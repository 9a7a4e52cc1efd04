"""Load the model and the training data, and put together what a run works on."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from mergekit_bayes.checkpoint.side_files import side_files
from mergekit_bayes.checkpoint.sources import commit_in, is_hub_id
from mergekit_bayes.documents import DocumentError, read_text
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.finetune.choices import Choices, choose
from mergekit_bayes.finetune.identity import identity_of
from mergekit_bayes.finetune.refusals import refuse_after
from mergekit_bayes.finetune.settings import FinetuneConfig, LoraSettings
from mergekit_bayes.libraries import reason
from mergekit_bayes.models.devices import choose_device
from mergekit_bayes.models.encode import observations
from mergekit_bayes.models.examples import Encoded, Weights, read_examples
from mergekit_bayes.models.load import UNIT, Loaded, is_classifier, load_model
from mergekit_bayes.models.packing import pack_documents
from mergekit_bayes.models.places import kept_tensors, stored_places
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.models.sharding import all_ranks, shard
from mergekit_bayes.posterior import Identity
from mergekit_bayes.posterior.info import base_identity
from mergekit_bayes.ranks import in_step, in_turn, is_main, main_first, on_main

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

_CLASSES = 65_536  # outputs of a new head
Examples = list[dict[str, Any]]  # rows of `input_ids` and `labels`, as Python lists and numbers


class _Rows(NamedTuple):
    """Training data, held-out data and what is said of both, as `Run` has them."""

    examples: Examples
    held_out: Examples
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """All that a fine-tune works on, from the first step to the stored posterior.

    Attributes:
        config: The settings, as given.
        loaded: The model that is trained, with its adapter if there is one.
        examples: Encoded training data.
        held_out: Encoded held-out data; empty without any.
        notes: What was guessed of the data, cut or left out.
        choices: The settings that training uses, with every default filled in.
        base: Content hash of the checkpoint that training starts from; None where it has none.
        identity: All that decides the bits of the run. A checkpoint stores it, and only a run of
            the same identity may resume from there.
    """

    config: FinetuneConfig
    loaded: Loaded
    examples: Examples
    held_out: Examples
    notes: tuple[str, ...]
    choices: Choices
    base: Identity | None
    identity: dict[str, object]

    @property
    def observations(self) -> int:
        """Number of observations in the training data: scored tokens, or rows."""
        return observations(self.examples, self.loaded.task)

    @property
    def unit(self) -> Literal["token", "example"]:
        """Name of one observation."""
        return UNIT[self.loaded.task]


def load_run(config: FinetuneConfig, processes: int) -> Run:
    """Load model and data, and choose what the settings leave open. Every rank must call this.

    Args:
        config: Settings of the run.
        processes: Number of ranks that train.

    Raises:
        CheckpointError: The model or the data cannot be loaded.
        ConfigError: A model that cannot be trained, or an adapter that does not fit it.
        MismatchError: Data without the named columns or with unknown labels.
    """
    if config.shard:
        loaded, rows, base, choices = _load_shards(config, processes)
    else:
        loaded, base = main_first(lambda: _load(config))
        rows = main_first(lambda: _load_examples(config, loaded))
        choices = choose(config, loaded, rows.examples, processes)
    warn_of_rounding(config, loaded)
    warn_of_warmup(config, choices)
    identity = identity_of(config, choices.record(), base, rows.examples, rows.held_out)
    return Run(config, loaded, *rows, choices, base, identity)


def _load_shards(
    config: FinetuneConfig, processes: int
) -> tuple[Loaded, _Rows, Identity | None, Choices]:
    """Load and shard the model in one process of a machine after the other: one holds it whole."""
    mesh = in_step(all_ranks)

    def load() -> tuple[Loaded, Identity | None, tuple[_Rows, Choices] | None]:
        loaded, base = _load(config)
        first = None
        if is_main():  # choices are of whole weights
            rows = _load_examples(config, loaded)
            first = rows, choose(config, loaded, rows.examples, processes)
        if not hasattr(loaded.model, "peft_config"):  # of which all is stored at once
            stored_places(loaded.model, kept_tensors(loaded.model))
        shard(loaded.model, mesh, config.model, "Leave shard out, or start one process.")
        return loaded, base, first

    loaded, base, first = in_turn(load)
    rows = in_step(lambda: _load_examples(config, loaded) if first is None else first[0])
    return loaded, rows, base, on_main(lambda: cast(Any, first)[1])


def _load(config: FinetuneConfig) -> tuple[Loaded, Identity | None]:
    loaded = load_base(config)
    if config.chat_template is not None:
        loaded.tokenizer.chat_template = _read_template(Path(config.chat_template))
    if config.lora is not None:
        model = with_lora(loaded, config.lora, config.model)
        loaded = replace(loaded, model=model)
    refuse_after(config, loaded)
    if loaded.task == "classification":
        # Whoever reads the head later must not guess from its labels' names how it was trained.
        loaded.model.config.problem_type = "single_label_classification"
    return loaded, base_identity(loaded.path)


def _read_template(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, DocumentError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"chat_template: {file} cannot be read ({why}). Name a file with a Jinja template."
        ) from None


def load_base(config: FinetuneConfig) -> Loaded:
    """Load the model that is trained, before an adapter is put on it, and try it.

    Raises:
        CheckpointError: It cannot be loaded or run, or a link leads out of its folder.
    """
    loaded = _load_model(config)
    if config.attn_implementation is not None:
        _choose_attention(loaded, config.attn_implementation)
    _refuse_links(loaded)
    if choose_device(None).type == "cpu":  # where it would be run on a GPU, it is not there yet
        loaded.try_out()
    return loaded


def _choose_attention(loaded: Loaded, name: str) -> None:
    """Let the model, below an adapter, use this attention."""
    if name == "flex_attention" and choose_device(None).type == "cpu":
        raise ConfigError(
            "attn_implementation: flex_attention has no backward pass on a CPU. Choose sdpa or "
            "eager, or leave it out."
        )
    try:
        model = (
            loaded.model.get_base_model() if hasattr(loaded.model, "peft_config") else loaded.model
        )
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"attn_implementation: {name} cannot be used here ({reason(error)}). Choose another, "
            "eager, or leave it out."
        ) from None


def warn_of_rounding(config: FinetuneConfig, loaded: Loaded) -> None:
    """Say if AdamW's steps will be lost in the weights' own rounding; IVON's mean is float32."""
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    narrow = {p.dtype for p in trained if p.is_floating_point() and p.dtype.itemsize < 4}
    if narrow and config.optimizer == "adamw" and is_main():
        name = str(narrow.pop()).removeprefix("torch.")
        logger.warning(
            "dtype: the trained weights are %s, in whose rounding many steps of the default "
            "size are lost. Use dtype: float32 with bf16: true, or lora.",
            name,
        )


def warn_of_warmup(config: FinetuneConfig, choices: Choices) -> None:
    """Say if the run ends before the learning rate has risen to what was set."""
    if config.warmup_steps >= choices.steps and is_main():
        logger.warning(
            "warmup_steps: the run has %d steps, so in %d steps of warm-up the rate never reaches "
            "learning_rate %g. Lower warmup_steps, or train longer.",
            choices.steps,
            config.warmup_steps,
            choices.learning_rate,
        )


def _refuse_links(loaded: Loaded) -> None:
    """Refuse links that lead out of the model's folder: the tokenizer is stored with the result."""
    for folder in {loaded.path, Path(str(loaded.tokenizer.name_or_path))}:
        if folder.is_dir():
            side_files(folder)


def _load_model(config: FinetuneConfig) -> Loaded:
    """Load the model; a checkpoint without a head gets one for the labels in the data."""
    needs_head = config.task == "classification" and config.num_labels is None
    if not needs_head or is_classifier(config.model, trust_remote_code=config.trust_remote_code):
        return load_model(
            config.model,
            config.task,
            num_labels=config.num_labels,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )
    rows = load_rows(
        config.paths, where=config.where, max_rows=config.max_rows, label=config.label_column
    )
    labels = sorted(set(rows[config.label_column]), key=lambda label: (str(type(label)), label))
    are_names = not all(isinstance(label, int) for label in labels)
    if not are_names and max(labels) >= _CLASSES:
        raise MismatchError(
            f"label {max(labels):,} in column '{config.label_column}': a new head has an output "
            f"for each number up to it, and at most {_CLASSES:,}. Number the labels from 0."
        )
    loaded = load_model(
        config.model,
        config.task,
        num_labels=len(labels) if are_names else max(1, *labels) + 1,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    if are_names:
        loaded.model.config.id2label = {i: str(label) for i, label in enumerate(labels)}
        loaded.model.config.label2id = {str(label): i for i, label in enumerate(labels)}
    return loaded


def with_lora(loaded: Loaded, lora: LoraSettings, name: str) -> "PeftModel":
    """Put a new adapter on the model; `name` is how the user named the base.

    Raises:
        ConfigError: The model is an adapter already, or has none of the modules.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if hasattr(loaded.model, "peft_config"):  # the new one would take its place
        raise ConfigError(
            f"lora: '{name}' is an adapter already. Leave lora out, and it is trained further."
        )
    modules = lora.target_modules
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules) if isinstance(modules, tuple) else modules,
        task_type=TaskType.SEQ_CLS if loaded.task == "classification" else TaskType.CAUSAL_LM,
        # The layers of GPT-2 store their weights transposed.
        fan_in_fan_out=loaded.model.config.model_type == "gpt2",
    )
    try:
        model = get_peft_model(loaded.model, settings)
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None
    # Where the adapter will look for its base: the Hub id as given, or the folder's full path.
    stored, (repo, _, revision) = model.peft_config["default"], name.partition("@")
    stored.base_model_name_or_path = repo if is_hub_id(name) else str(loaded.path.resolve())
    commit = commit_in(name, loaded.path)
    stored.revision = commit or (revision if is_hub_id(name) else None) or None
    return model


def _load_examples(config: FinetuneConfig, loaded: Loaded) -> _Rows:
    read, held_out = _read_examples(config, loaded), Encoded(0, [])
    if config.eval_data is not None:
        held_out = _read_held_out(config, loaded)
    notes = read.notes + tuple(f"eval_data: {note}" for note in held_out.notes)
    return _Rows(read.examples, held_out.examples, notes)


def _read_examples(config: FinetuneConfig, loaded: Loaded) -> Encoded:
    length_is_given = "max_length" in config.model_fields_set
    if length_is_given and config.max_length > (context := loaded.context) and is_main():
        logger.warning(
            "max_length: the model sees %d tokens, so rows are cut there and not at %d",
            context,
            config.max_length,
        )
    if config.pack and loaded.task == "classification":
        raise ConfigError("pack is for language models. Leave it out, to train a classifier.")
    read = read_examples(
        config.paths,
        loaded,
        columns=config.columns,
        label=_label(config, loaded),
        where=config.where,
        max_rows=config.max_rows,
        max_length=config.max_length,
        pack=config.pack == "joined",
        weights=Weights([source.weight for source in config.data], config.seed),
    )
    packed = _packed(config, loaded, read.examples)
    if packed is read.examples:
        return read
    note = f"pack: {len(read.examples):,} rows are packed into {len(packed):,}"
    return read._replace(examples=packed, notes=(*read.notes, note))


def _read_held_out(config: FinetuneConfig, loaded: Loaded) -> Encoded:
    """Held-out rows, which are never joined: their loss is that of each row by itself."""
    read = read_examples(
        config.eval_sources,
        loaded,
        columns=config.columns,
        label=_label(config, loaded),
        where=config.where,
        max_length=config.max_length,
    )
    return read._replace(examples=_packed(config, loaded, read.examples))


def _label(config: FinetuneConfig, loaded: Loaded) -> str | None:
    return config.label_column if loaded.task == "classification" else None


def _packed(config: FinetuneConfig, loaded: Loaded, examples: Examples) -> Examples:
    if config.pack != "documents":
        return examples
    return pack_documents(examples, min(config.max_length, loaded.context))
