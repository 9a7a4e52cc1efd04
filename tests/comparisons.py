"""Reports of models side by side with any number of models, variants, texts and scorers."""

from mergekit_bayes.compare.report import CompareReport, Evaluated
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.quality import SamplesReport
from mergekit_bayes.metrics.toxicity import ToxicityReport

MODELS = (
    "base",
    "llama-3.1-8b-instruct-detoxified-by-gradient-matching",
    "runs/adapted|by`precision`",
    "task-arithmetic",
    "fisher-negation-with-a-long-name",
    "npo",
)
TEXTS = ("civil comments on a long name of a newspaper", "yelp sentences", "wikipedia", "novels")
SCORERS = ("model:org/roberta-toxicity-classifier-of-a-long-name#toxic", "words:lists/words.txt")


def around(value, half):
    return Interval(value=value, low=value - half, high=value + half)


def compare_report(models, texts, scorers=2, variants=("as it is",)):
    """A report without differences; names are long, and hold what breaks tables."""
    evaluations = []
    for i, model in enumerate(MODELS[:models]):
        for j, variant in enumerate(variants):
            place = i + 0.3 * j
            label = model if variant == "as it is" else f"{model} {variant}"
            report = EvaluateReport(
                model=model,
                model_identity=f"{i}{j}" * 8,
                variant=variant,
                settings={"threshold": 0.5, "seed": 0},
                dtype="float32",
                perplexity={n: _perplexity(20 + k + place) for k, n in enumerate(TEXTS[:texts])},
                toxicity={s: _toxicity(0.08 - 0.01 * place) for s in SCORERS[:scorers]},
                samples=SamplesReport(
                    prompts=100,
                    continuations=2500,
                    mean_tokens=18 - place,
                    empty=0.01 * place,
                    distinct_2=0.7,
                    repeated=0.05 + 0.01 * place,
                    looping=0.002 * place,
                    shortened=0,
                    intervals={"distinct_2": around(0.7, 0.01)},
                ),
            )
            one = Evaluated(label=label, model=model, variant=variant, report=report)
            evaluations.append(one)
    return CompareReport(settings={}, evaluations=tuple(evaluations))


def _perplexity(value):
    other = around(value / 20, 0.1)
    return PerplexityReport(
        protocol="rolling",
        window=1024,
        stride=1024,
        documents=100,
        tokens=5000,
        words=4000,
        bytes=20000,
        nats=15000,
        loss=other,
        token=around(value, 1.2),
        word=other,
        byte=other,
        bits_per_byte=other,
    )


def _toxicity(share):
    found = around(share, 0.008)
    return ToxicityReport(
        mean=found,
        share=found,
        expected_max=found,
        any_toxic=found,
        threshold=0.5,
        n_prompts=100,
        n_continuations=2500,
    )
