"""What must be true of every adaptation, in float64 on problems whose answers are known.

The objective is the one that `bmerge adapt` trains with. Rows of a block have orthogonal columns,
so that its curvature is diagonal and a diagonal precision is the exact one.
"""

import types
from typing import NamedTuple

import pytest
import torch

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt.data import CollateParts, Mixture
from mergekit_bayes.adapt.kprior import weight_precision
from mergekit_bayes.adapt.losses import ascent, kl_uniform, npo
from mergekit_bayes.adapt.objective import PARTS, Objective
from mergekit_bayes.adapt.teacher import FrozenCopy
from mergekit_bayes.adapt.units import Units, choose_units
from mergekit_bayes.adapt.weights import WeightPart
from tests.cases import CASES, Classifier, flat

PRIOR = 0.3  # around zero weights
NAME = "module.weight"  # of the only parameter of a regression


class Rows(NamedTuple):
    """Inputs (n, inputs) and labels of rows; of memory rows the labels mean nothing."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __add__(self, other):
        return Rows(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def __mul__(self, times):
        return Rows(self.inputs.repeat(times, 1), self.labels.repeat(times, 1))


def block(seed, *, orthogonal=True, rows=8):
    """Rows of a regression with three inputs and one output."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    if orthogonal:
        scales = torch.tensor([0.7, 1.3, 2.0], dtype=torch.float64).roll(seed)
        inputs = torch.linalg.qr(inputs).Q * scales
    return Rows(inputs, torch.randn(rows, 1, generator=generator, dtype=torch.float64))


def curvature(rows):
    """Diagonal of the Hessian of the summed loss of a regression, (1, 3)."""
    return rows.inputs.square().sum(0, keepdim=True)


def joint(rows):
    """Weights of a regression that is trained on these rows together, (1, 3)."""
    hessian = rows.inputs.T @ rows.inputs + PRIOR * torch.eye(3, dtype=torch.float64)
    return torch.linalg.solve(hessian, rows.inputs.T @ rows.labels).T


def objective_of(model, parts, precision=None, *, kappa=1.0, tau=1.0, removal="ascent", beta=0.1):
    """J, in nats of the summed loss, as a function without arguments, for a start `model`.

    Args:
        model: The model, whose weights are the start and then change.
        parts: Rows of each part by its name.
        precision: S_w by parameter name; None for no weight-space part.
        kappa, tau, removal, beta: As in the settings.
    """
    sizes = {name: len(rows.labels) for name, rows in parts.items()}
    units = Units(
        unit="example",
        removed=sizes.get("remove", 0),
        added=sizes.get("add", 0) or 1,  # J is divided by their sum, which must not be 0
        contrast=sizes.get("contrast", 0),
        memory=sizes.get("memory", 0),
        base=0.0,
        base_is_recorded=True,
        kappa=kappa,
        tau=tau,
        learning_rate=0.0,
        lr=0.0,
        steps=1,
    )

    penalty = WeightPart(model, precision) if precision else None
    function = Objective(units, sizes, removal, beta, FrozenCopy(model), penalty)
    inputs = torch.cat([rows.inputs for rows in parts.values()])
    batch = {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "labels": torch.cat([rows.labels for rows in parts.values()]),
        "part": torch.tensor([PARTS.index(n) for n, count in sizes.items() for _ in range(count)]),
        "index": torch.tensor([i for count in sizes.values() for i in range(count)]),
    }
    return lambda: function(model, batch).total * units.edited


def minimise(value, parameters, steps=30):
    """Newton's method from the present weights to a stationary point."""
    parameters = list(parameters)
    for _ in range(steps):
        gradients = torch.autograd.grad(value(), parameters, create_graph=True)
        gradient = torch.cat([g.flatten() for g in gradients])
        rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
        hessian = torch.stack([flat(row) for row in rows])
        step = torch.linalg.solve(hessian, gradient.detach())
        with torch.no_grad():
            for p, change in zip(
                parameters, step.split([p.numel() for p in parameters]), strict=True
            ):
                p -= change.view_as(p)
        if float(step.norm()) < 1e-11:
            return
    raise AssertionError(f"no stationary point: the last step was {step.norm()}")


def adapted(start, parts, precision=None, **settings):
    """Weights of a regression that is adapted from `start`, (1, 3)."""
    model = Classifier(torch.nn.Linear(3, 1, bias=False).double(), "regression")
    with torch.no_grad():
        model.module.weight.copy_(start)
    precision = None if precision is None else {NAME: precision}
    minimise(objective_of(model, parts, precision, **settings), model.parameters())
    return model.module.weight.detach()


def held_by(form, seen, memory):
    """S_w and the memory's rows for one form of the K-prior of a model that has seen these rows.

    Args:
        form: "weights" for no memory, "functions" for all rows as the memory, "both" for a part.
        seen: All rows.
        memory: The part.
    """
    start, rows = curvature(seen) + PRIOR, {"weights": None, "functions": seen, "both": memory}
    chosen = rows[form]
    share = None if chosen is None else {NAME: curvature(chosen)}
    precision = weight_precision({NAME: start}, share, 1.0, PRIOR)[NAME]
    return precision, {} if chosen is None else {"memory": chosen}


def same(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def apart(found, expected):
    assert float((found - expected).abs().max()) > 1e-3  # `same` means 1e-9


FORMS = ("weights", "functions", "both")
of_every_form = pytest.mark.parametrize("form", FORMS)


@of_every_form
def test_adding_equals_training_on_old_and_new_data_together(form):
    """The new data need no diagonal curvature: their own loss is there."""
    old, memory, new = block(0), block(1), block(2, orthogonal=False)
    precision, rows = held_by(form, old + memory, memory)
    found = adapted(joint(old + memory), {"add": new, **rows}, precision)
    same(found, joint(old + memory + new))


@of_every_form
def test_removing_seen_rows_equals_training_without_them(form):
    old, memory, removed = block(0), block(1), block(2)
    seen = old + memory + removed
    precision, rows = held_by(form, seen, memory)
    found = adapted(joint(seen), {"remove": removed, **rows}, precision)
    same(found, joint(old + memory))


@of_every_form
def test_adding_removed_rows_again_gives_the_model_back(form):
    """With S_0 - H_R, which removing leaves, as the next precision."""
    old, memory, removed = block(0), block(1), block(2)
    seen = old + memory + removed
    precision, rows = held_by(form, seen, memory)
    without = adapted(joint(seen), {"remove": removed, **rows}, precision)
    precision, rows = held_by(form, old + memory, memory)
    same(precision, held_by(form, seen, memory)[0] - (form != "functions") * curvature(removed))
    same(adapted(without, {"add": removed, **rows}, precision), joint(seen))


def test_ten_edits_in_a_row_end_where_joint_training_does():
    """With the precision of the last edit as the prior of the next."""
    seen = block(0) + block(1)
    mean, precision = joint(seen), curvature(seen) + PRIOR
    for seed in range(2, 12):
        new = block(seed)
        # Every third edit takes the rows of the second block before out again.
        part, sign, rows = ("remove", -1, block(seed - 2)) if seed % 3 == 1 else ("add", 1, new)
        mean = adapted(mean, {part: rows}, precision)
        precision = precision + sign * curvature(rows)
        kept = seen + rows if sign > 0 else None
        if kept is None:
            keep = [not (r == rows.inputs).all(-1).any() for r in seen.inputs]
            kept = Rows(seen.inputs[keep], seen.labels[keep])
        seen = kept
        same(mean, joint(seen))
        same(precision, curvature(seen) + PRIOR)
    assert len(seen.labels) == 8 * (2 + 7 - 3)


def test_with_correlated_inputs_functions_are_exact_and_a_diagonal_is_not():
    seen, new = block(0, orthogonal=False), block(1, orthogonal=False)
    start, expected = joint(seen), joint(seen + new)
    for form, agrees in (("functions", same), ("weights", apart)):
        precision, rows = held_by(form, seen, None)
        agrees(adapted(start, {"add": new, **rows}, precision), expected)


def test_data_of_the_memory_would_count_twice_under_the_whole_precision():
    """Why `weight_precision` takes the memory's share away."""
    old, memory, new = block(0), block(1), block(2)
    whole = curvature(old + memory) + PRIOR
    start, expected = joint(old + memory), joint(old + memory + new)
    apart(adapted(start, {"add": new, "memory": memory}, whole), expected)
    reduced = weight_precision({NAME: whole}, {NAME: curvature(memory)}, 1.0, PRIOR)[NAME]
    same(adapted(start, {"add": new, "memory": memory}, reduced), expected)


def test_a_memory_whose_curvature_exceeds_the_start_leaves_the_prior():
    whole, share = {NAME: torch.tensor([2.0, 5.0])}, {NAME: torch.tensor([3.0, 1.0])}
    same(weight_precision(whole, share, 1.0, PRIOR)[NAME], torch.tensor([PRIOR, 4.0]))
    same(weight_precision(whole, share, 0.5, PRIOR)[NAME], torch.tensor([0.5, 4.5]))
    same(weight_precision(whole, share, 0.0, PRIOR)[NAME], whole[NAME])


def test_the_default_kappa_is_exact_for_a_memory_that_represents_the_data():
    """Every memory row stands for five rows that the model has seen, with five labels."""
    memory = block(0, orthogonal=False)
    others = [Rows(memory.inputs, block(seed).labels) for seed in range(5)]
    seen, new = others[0], block(9, orthogonal=False)
    for rows in others[1:]:
        seen = seen + rows
    config = AdaptConfig(
        model="m", output="o", learning_rate=1.0, base_observations=len(seen.labels)
    )
    counts = {"add": len(new.labels), "memory": len(memory.labels)}
    units = choose_units(config, None, counts, None, "example")
    assert (units.kappa, units.tau) == (5, 1)
    flat_prior = torch.full((1, 3), PRIOR, dtype=torch.float64)
    parts = {"add": new, "memory": memory}
    found = adapted(joint(seen), parts, flat_prior, kappa=units.kappa, tau=units.tau)
    same(found, joint(seen + new))
    apart(adapted(joint(seen), parts, flat_prior, kappa=2 * units.kappa), joint(seen + new))


@of_every_form
@pytest.mark.parametrize("part", ["remove", "add"])
def test_nothing_moves_as_tau_goes_to_infinity(form, part):
    """The way from the start falls as 1 / tau."""
    old, memory, edited = block(0), block(1), block(2)
    precision, rows = held_by(form, old + memory, memory)
    start, moved = joint(old + memory), []
    for tau in (1e3, 1e6):
        found = adapted(start, {part: edited, **rows}, precision, tau=tau)
        moved.append(float((found - start).norm()))
    assert 0 < moved[0] < 1e-2
    assert moved[1] == pytest.approx(1e-3 * moved[0], rel=0.01)


def test_npo_is_no_removal_of_data():
    """It is bounded, and its slope falls with the likelihood, so that it stops short of it."""
    old, removed = block(0), block(1)
    start, precision = joint(old + removed), curvature(old + removed) + PRIOR
    parts, exact = {"remove": removed}, joint(old)
    apart(adapted(start, parts, precision, removal="npo", beta=1.0), exact)
    gaps = [
        float((adapted(start, parts, precision, removal="npo", beta=b) - exact).norm())
        for b in (1.0, 0.1, 0.01)
    ]
    assert gaps[0] > gaps[1] > gaps[2]  # towards beta = 0 it becomes `ascent`
    assert gaps[2] < 0.05 * gaps[0]


def test_matched_rows_of_a_contrast_count_as_the_removed_ones_do():
    """Contrast is npo, and the mean loss of the matched rows times N_r."""
    old, removed, matched = block(0), block(1), block(2, rows=24)
    model = Classifier(torch.nn.Linear(3, 1, bias=False).double(), "regression")
    with torch.no_grad():
        model.module.weight.copy_(joint(old + removed))
    both = objective_of(model, {"remove": removed, "contrast": matched}, removal="contrast")
    alone = objective_of(model, {"remove": removed}, removal="npo")
    with torch.no_grad():
        model.module.weight.add_(0.3)
        loss = 0.5 * (model(matched.inputs).logits - matched.labels).square().mean()
        same(both() - alone(), len(removed.labels) * loss)


LINEAR = [name for name, case in CASES.items() if case.is_linear]


def gradient_gap(case):
    """Relative gap between the gradient of K with all inputs as its memory and that of the
    objective which the start minimises, at weights far from the start.
    """
    model = case.model(torch.float64)
    count, rows = len(case.inputs), Rows(case.inputs, case.targets)
    parameters = list(model.parameters())

    def old():
        squares = sum(p.square().sum() for p in parameters)
        return count * case.loss(model) + 0.5 * PRIOR * squares

    minimise(old, parameters, steps=200)
    assert float(case.loss(model).detach()) > 1e-3
    precision = {n: torch.full_like(p, PRIOR) for n, p in model.named_parameters()}
    prior = objective_of(model, {"memory": rows}, precision)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            p += torch.randn(p.shape, generator=generator, dtype=p.dtype)
    expected, found = (flat(torch.autograd.grad(f(), parameters)) for f in (old, prior))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", LINEAR)
def test_with_all_inputs_in_memory_the_gradient_is_that_of_the_old_objective(name):
    """For generalised linear models, at any weights (Khan and Swaroop, 2021)."""
    assert gradient_gap(CASES[name]) < 1e-9


def test_the_objective_of_a_perceptron_is_rebuilt_only_in_part():
    """Its residuals pull on other features as soon as its weights move."""
    assert gradient_gap(CASES["perceptron, regression"]) > 0.01


LOG_P = torch.linspace(-30, 0, 61, dtype=torch.float64)


def test_npo_becomes_ascent_and_a_constant_as_beta_goes_to_zero():
    start, beta = torch.full_like(LOG_P, -8.0), 1e-6
    constant = 2 / beta * torch.log(torch.tensor(2.0, dtype=torch.float64)) + 8.0
    torch.testing.assert_close(npo(LOG_P, start, beta), ascent(LOG_P) + constant, rtol=0, atol=1e-3)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_npo_has_the_slope_of_ascent_at_the_start_and_none_far_below(beta):
    ratios = torch.tensor([-200 / beta, -1.0, 0.0, 1.0], dtype=torch.float64).requires_grad_()
    losses = npo(ratios, torch.zeros_like(ratios), beta)
    assert (losses >= 0).all()
    assert (losses[1:] > losses[:-1]).all()
    assert float(losses[0].detach()) < 1e-12
    (slopes,) = torch.autograd.grad(losses.sum(), ratios)
    assert float(slopes[0]) < 1e-12
    same(slopes[2], torch.ones((), dtype=torch.float64))
    assert float(slopes[1]) < 1 < float(slopes[3]) <= 2


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_kl_uniform_is_zero_at_the_uniform_distribution_and_positive_elsewhere(likelihood):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    assert (kl_uniform(logits, likelihood) > 0).all()
    uniform = torch.zeros(1, 4, dtype=torch.float64)
    assert float(kl_uniform(uniform, likelihood)) == 0
    if likelihood == "categorical":  # softmax does not see a common constant
        same(kl_uniform(logits + 3, likelihood), kl_uniform(logits, likelihood))


class Bigrams(torch.nn.Module):
    """A language model of token pairs: the logits after a token are a row of a table."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(problem_type=None, num_labels=7)
        self.table = torch.nn.Embedding(7, 7).double()

    def forward(self, input_ids, attention_mask=None):
        return types.SimpleNamespace(logits=self.table(input_ids))


def documents(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    rows = [torch.randint(7, (n,), generator=generator).tolist() for n in lengths]
    assert len({len(row) for row in rows}) > 1
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("removal", ["npo", "ascent", "kl_uniform", "contrast"])
def test_the_mean_over_all_batches_is_the_whole_objective(removal):
    """Of rows of unequal length, with parts of unequal size: a part of six comes twice while one of
    twelve comes once, in the batches that a run would take.
    """
    torch.manual_seed(0)
    model = Bigrams()
    start, beta, kappa, tau = model.table.weight.detach().clone(), 0.5, 1.7, 0.6
    parts = {"remove": documents(12, 1), "add": documents(6, 2), "memory": documents(4, 3)}
    if removal == "contrast":
        parts["contrast"] = documents(3, 4)
    counts = {n: sum(len(d["labels"]) - 1 for d in rows) for n, rows in parts.items()}
    units = Units(
        unit="token",
        removed=counts["remove"],
        added=counts["add"],
        contrast=counts.get("contrast", 0),
        memory=counts["memory"],
        base=0.0,
        base_is_recorded=True,
        kappa=kappa,
        tau=tau,
        learning_rate=0.0,
        lr=0.0,
        steps=1,
    )
    sizes = {name: len(rows) for name, rows in parts.items()}
    objective = Objective(
        units, sizes, removal, beta, FrozenCopy(model), lambda: model.table.weight.square().sum()
    )
    with torch.no_grad():
        model.table.weight += torch.randn(7, 7, dtype=torch.float64)
    log_p, log_p0 = (table.log_softmax(-1).detach() for table in (model.table.weight, start))

    def total(name, loss):
        pairs = [p for d in parts[name] for p in zip(d["labels"], d["labels"][1:], strict=False)]
        return sum(loss(before, token) for before, token in pairs)

    def removed(a, b):
        if removal == "ascent":
            return log_p[a, b]
        if removal == "kl_uniform":
            return -log_p[a].mean() - torch.log(torch.tensor(7.0, dtype=torch.float64))
        return 2 / beta * torch.log1p(torch.exp(beta * (log_p[a, b] - log_p0[a, b])))

    whole = total("remove", removed) - total("add", lambda a, b: log_p[a, b])
    whole += (
        tau * kappa * total("memory", lambda a, b: (log_p0[a].exp() * (log_p0[a] - log_p[a])).sum())
    )
    whole += tau * model.table.weight.detach().square().sum()
    if removal == "contrast":
        share = counts["remove"] / counts["contrast"]
        whole -= share * total("contrast", lambda a, b: log_p[a, b])

    items, collate = Mixture(parts, 12, seed=5), CollateParts(pad=0)
    batches = [collate([items[i] for i in range(j, j + 3)]) for j in range(0, 12, 3)]
    values = torch.stack([objective(model, batch).total.detach() for batch in batches])
    assert float(values.std()) > 1e-3
    same(values.mean() * units.edited, whole)
