"""Reports of removals with any number of texts, curves and scorers, for drawing."""

from mergekit_bayes.detox.report import DetoxReport, Point
from tests.detox_worlds import GRID, HELD_OUT, TEXT, World, falling

LABELS = (
    "task arithmetic",
    "gradient matching, base 1x, shrink none",
    "control, base 1x, shrink none",
    "gradient matching, base 3x, shrink row:0.3",
    "control, base 3x, shrink row:0.3",
    "gradient matching, base 10x, shrink 0.25",
)
TEXTS = ("civil comments on a long name of a newspaper", "yelp sentences", "wikipedia", "novels")
SCORERS = ("model:org/roberta-toxicity-classifier-of-a-long-name", "words:list.txt")


def picture_report(texts: int, curves: int, scorers: int = 1, held_out: bool = True) -> DetoxReport:
    """A report with these numbers of texts, curves and scorers; labels and names are long."""
    drawn = World(prompts=20, documents=20, toxic=falling, bootstrap=0).draw(0)

    def point(place: float) -> Point:
        report = drawn.report(place)
        toxicity = next(iter(report.toxicity.values()))
        perplexity = {name: _with_token(report.perplexity[TEXT]) for name in TEXTS[:texts]}
        if held_out:
            perplexity[HELD_OUT] = _with_token(report.perplexity[HELD_OUT])
        return Point.model_construct(
            scale=place, toxicity=dict.fromkeys(SCORERS[:scorers], toxicity), perplexity=perplexity
        )

    lines = {
        label: tuple(point(scale * (1 + 0.2 * i)) for scale in GRID)
        for i, label in enumerate(LABELS[:curves])
    }
    return DetoxReport.model_construct(base=point(0.0), curves=lines)


def _with_token(report):
    loss = report.loss
    token = loss.model_copy(update={"value": 2.718281828**loss.value})
    return report.model_copy(update={"token": token})
