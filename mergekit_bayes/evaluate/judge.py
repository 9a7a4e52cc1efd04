"""The judge: another language model, under which the continuations have a perplexity."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.identity import checkpoint_identity
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.report import JudgeInfo, StepProgress
from mergekit_bayes.generation import Samples, room_for_prompts
from mergekit_bayes.libraries import call_tokenizers
from mergekit_bayes.metrics.quality import Judged, judge_continuations
from mergekit_bayes.models.load import Loaded, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEEN = 8  # tokens of a prompt's end that show what stands between it and a continuation


class Judge(NamedTuple):
    """A judge that runs, and what the report says about it."""

    loaded: Loaded
    info: JudgeInfo

    def read(
        self,
        prompts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        batch_size: int,
        tell: StepProgress,
    ) -> Judged:
        """The log-probability of each continuation after its prompt.

        Args:
            prompts: What was continued.
            continuations: Of each prompt, as they follow it.
            batch_size: As `judge_continuations`.
            tell: Called with (step, done, of).

        Raises:
            CheckpointError: The judge fails on a text, or its log-probabilities are not numbers.
        """
        try:
            return judge_continuations(
                self.loaded.model,
                self.loaded.tokenizer,
                prompts,
                continuations,
                start=self.loaded.start,
                window=self.loaded.context,
                batch_size=batch_size,
                progress=partial(tell, "judging"),
            )
        except CheckpointError as error:
            raise CheckpointError(f"judge '{self.info.model}': {error}") from None


def open_judge(
    ref: str,
    device: str | None = None,
    dtype: str = "float32",
    *,
    new_tokens: int,
    trust_remote_code: bool = False,
) -> Judge:
    """Load a judge, and run it on a few tokens.

    Args:
        ref: A local folder or `org/name[@revision]`.
        device: Where it runs, by `models.devices.choose_device`.
        dtype: Type of its parameters.
        new_tokens: Tokens of a continuation at most, by the tokenizer of the model that is judged.
        trust_remote_code: Run Python code of its folder, where it needs any.

    Raises:
        CheckpointError: There is no such model, or it does not run.
        MismatchError: It is a classifier.
        ConfigError: Its context has no room for a continuation, or there is no such device.
    """
    loaded = load_model(ref, dtype=dtype, trust_remote_code=trust_remote_code)
    if loaded.task != "causal-lm":
        raise MismatchError(
            f"judge '{ref}' is a classifier, expected a causal language model. To score texts with "
            f"a classifier: --scorer model:{ref}#LABEL."
        )
    try:
        room_for_prompts(loaded.context, new_tokens)
        _ = loaded.start  # which a tokenizer may lack
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"judge '{ref}': {error}") from None
    loaded.move_to(device)
    info = JudgeInfo(
        model=ref,
        fingerprint=checkpoint_identity(loaded.path),
        context=loaded.context,
        device=str(loaded.device),
        dtype=loaded.dtype,
    )
    return Judge(loaded, info)


def following(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], samples: Samples
) -> list[list[str]]:
    """Continuations as they follow their prompts, with the space between both.

    Tokenizers whose tokens do not hold it (of whole words), or that take it from the front of what
    they decode (SentencePiece), drop it from `Samples.texts`: there `the cat` goes on with `sat`,
    here with ` sat`. It is seen by decoding the end of the prompt alone and with the continuation.

    Args:
        tokenizer: Of the model that drew the samples.
        prompts: What was continued.
        samples: What was drawn.
    """
    options = {"add_special_tokens": False, "verbose": False}
    ends = [tokenizer(p, **options)["input_ids"][-_SEEN:] for p in prompts]
    result = []
    for end, texts, drawn in zip(ends, samples.texts, samples.ids, strict=True):
        before, *both = call_tokenizers(
            "the tokenizer cannot decode",
            partial(
                tokenizer.batch_decode,
                [end, *(end + ids for ids in drawn)],
                skip_special_tokens=True,
            ),
        )
        result.append(
            [
                whole.removeprefix(before) if whole.startswith(before) else text
                for whole, text in zip(both, texts, strict=True)
            ]
        )
    return result
