"""Settings and models that an evaluation refuses."""

from pathlib import Path

from mergekit_bayes.checkpoint.replacing import refuse_inputs
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.lm_eval import refuse_tasks
from mergekit_bayes.evaluate.panels import files_of
from mergekit_bayes.evaluate.settings import EvaluateConfig, is_by_name
from mergekit_bayes.generation import room_for_prompts
from mergekit_bayes.heads import Head, head_of
from mergekit_bayes.metrics.perplexity import fitting_stride
from mergekit_bayes.metrics.scorers import FORMS
from mergekit_bayes.models.devices import choose_device
from mergekit_bayes.models.load import Loaded, other_head
from mergekit_bayes.ranks import launched


def refuse_settings(config: EvaluateConfig) -> None:
    """Refuse settings that contradict each other, before anything is read.

    Raises:
        ConfigError: There is nothing to measure, a setting has no effect or no object, or there is
            no such device, or one for several processes.
        CheckpointError: The output exists and `force` is not set, or holds something to be read.
    """
    refuse_tasks(config)
    measured = (config.perplexity, config.toxicity, config.classify, config.lm_eval)
    if not any(measured):
        raise ConfigError(
            "nothing to measure. Name texts (--perplexity), prompts (--toxicity with --scorer), "
            "labelled texts (--classify) or tasks (--lm-eval)."
        )
    if config.toxicity is not None and not config.scorer:
        raise ConfigError(f"toxicity needs a scorer: --scorer {FORMS}.")
    if config.scorer and config.toxicity is None:
        raise ConfigError("a scorer needs prompts to continue: --toxicity FILE.")
    if config.judge is not None and config.toxicity is None:
        raise ConfigError("a judge reads continuations: name prompts to continue (--toxicity).")
    if len(set(config.scorer)) < len(config.scorer):
        raise ConfigError(f"a scorer is named twice: {', '.join(config.scorer)}.")
    if config.samples is not None and not config.perplexity and not config.classify:
        raise ConfigError(
            "samples average probabilities: name texts (--perplexity) or labelled texts "
            "(--classify). Toxicity is measured at the mean."
        )
    about_samples = (config.prior, config.posterior_temperature, config.precision)
    if config.samples is None and about_samples != (None, None, None):
        raise ConfigError(
            "--prior, --posterior-temperature and --precision are about --samples, which is not "
            "given."
        )
    if config.samples is not None and config.dtype in ("bfloat16", "float16"):
        raise ConfigError(
            f"samples with --dtype {config.dtype}: most draws are nearer to the mean than the next "
            f"{config.dtype} number, and would be rounded away. Give --dtype float32."
        )
    device = choose_device(config.device)
    if launched() and device.index is not None:
        raise ConfigError(
            f"--device {config.device}: {launched()} processes would run on this one GPU. Leave "
            "--device out, and each takes its own."
        )
    names = {**config.perplexity, **config.classify}
    for name in config.where if is_by_name(config.where) else ():
        if name not in names:
            raise ConfigError(f"where: no texts are called '{name}'; there are {', '.join(names)}.")
    if config.output is not None and Path(config.output).exists() and not config.force:
        raise CheckpointError(
            f"'{config.output}' exists. Choose another -o, or pass --force to replace it."
        )
    if config.output is not None:
        texts = (*config.perplexity.values(), *config.classify.values())
        scorers = files_of(config.scorer)
        others = (config.toxicity, config.precision, config.judge, config.lm_eval_include, *scorers)
        refuse_inputs(Path(config.output), [config.model, *texts, *filter(None, others)])


def refuse_model(config: EvaluateConfig, loaded: Loaded) -> None:
    """Refuse a model that cannot be measured as the config asks, before it runs.

    Raises:
        MismatchError: The model is a classifier where a language model is needed, or the reverse,
            or a classifier that does not choose one label.
        ConfigError: The window is longer than the model's context, the stride than the window, or
            the context has no room for the new tokens.
        CheckpointError: The tokenizer cannot start a document.
    """
    refuse_task(config, loaded.task)
    if config.classify and (other := other_head(loaded)):
        raise MismatchError(
            f"'{config.model}' is a classifier with {other}; --classify needs one with a single "
            "label of two classes or more."
        )
    if config.classify:
        _refuse_labels_that_occur_together(config.model, head_of(loaded.model.config))
    if config.window is not None and config.window > loaded.context:
        raise ConfigError(
            f"window {config.window}: '{config.model}' sees at most {loaded.context} tokens."
        )
    if config.perplexity:
        fitting_stride(config.stride, config.window or loaded.context)
    if config.toxicity is not None:
        room_for_prompts(loaded.context, config.new_tokens)
    if config.perplexity or config.toxicity is not None:
        _ = loaded.start  # which a tokenizer may lack


def refuse_task(config: EvaluateConfig, task: str) -> None:
    """Refuse a classifier where a language model is needed, or the reverse.

    Args:
        config: The model, and what to measure of it.
        task: `causal-lm` or `classification`.

    Raises:
        MismatchError: The model is of the other task.
    """
    if task != "causal-lm" and (config.perplexity or config.toxicity is not None):
        raise MismatchError(
            f"'{config.model}' is a classifier; perplexity and toxicity need a language model."
        )
    if task != "causal-lm" and config.lm_eval:
        raise MismatchError(
            f"'{config.model}' is a classifier; lm-eval's tasks need a language model."
        )
    if task != "classification" and config.classify:
        raise MismatchError(f"'{config.model}' is a language model; --classify needs a classifier.")


def _refuse_labels_that_occur_together(model: str, head: Head) -> None:
    if head.likelihood == "bernoulli":
        raise MismatchError(
            f"'{model}' is a classifier whose labels do not exclude each other: {head.reason}. "
            "--classify needs one with a single label. If its texts have exactly one label, write "
            "problem_type single_label_classification into its config.json."
        )
