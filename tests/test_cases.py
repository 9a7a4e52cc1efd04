"""Every optimizer and every estimator of curvature against dense matrices, on small problems."""

import pytest
import torch

from mergekit_bayes.curvature.ggn import ggn_diagonal, random_root
from mergekit_bayes.optim import BSAM, IVON, VOGN
from tests.cases import CASES, flat, output_factor

NO_NOISE = 1e16  # an ess at which samples are the mean, to float32's rounding
EXACT = [n for n, case in CASES.items() if case.is_linear and case.likelihood == "gaussian"]

of_every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def hess_of(optimizer, model):
    return flat(optimizer.state[p]["hess"] for p in model.parameters())


def sample(optimizer, case, model):
    """One weight sample, with its loss and, where the optimizer asks for them, its curvature."""
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        if isinstance(optimizer, VOGN):
            optimizer.backward(case.losses(model))
            return
        outputs = case.outputs(model)
        if isinstance(optimizer, IVON) and optimizer.curvature_due:
            generator = torch.Generator().manual_seed(optimizer.param_groups[0]["steps"])
            root = random_root(outputs.detach(), case.likelihood, generator)
            optimizer.add_curvature((root * outputs).sum(), len(outputs))
        case.loss(model).backward()


def step(optimizer, case, model):
    """One step, with all the samples and passes that the optimizer asks for."""
    for _ in range(int(optimizer.defaults.get("mc_samples", 1))):
        sample(optimizer, case, model)
    if isinstance(optimizer, BSAM):
        with optimizer.ascended_params():
            optimizer.zero_grad()
            case.loss(model).backward()
    optimizer.step()


@of_every_case
def test_the_dense_matrices_are_right_themselves(case):
    """Where outputs are linear in the weights, the GGN is the Hessian; it never is negative."""
    model = case.model(torch.float64)
    hessian, ggn = case.hessian(model), case.ggn(model)
    assert torch.linalg.eigvalsh(ggn).min() > -1e-12  # rounding of float64
    assert torch.allclose(hessian, ggn, rtol=0, atol=1e-12) == case.is_linear
    model.zero_grad()
    case.loss(model).backward()
    gradient = flat(p.grad for p in model.parameters())
    torch.testing.assert_close(case.gradients(model).mean(0), gradient, rtol=1e-10, atol=1e-12)


def projected_squares(case, roots):
    """Sum over the roots v, (n, C) each, of (sum_n v_n' J_n)^2, one entry a weight."""
    jacobian = case.jacobian(case.model())
    return sum(torch.einsum("nc,ncp->p", root.double(), jacobian).square() for root in roots)


@of_every_case
def test_a_draw_of_root_ggn_is_the_squared_projection_of_the_dense_jacobian(case):
    """With the second moment of the roots, in the next test, the estimate is right exactly."""
    model, batches = case.model(), 3
    outputs, generator = case.outputs(model).detach(), torch.Generator().manual_seed(3)
    roots = [random_root(outputs, case.likelihood, generator) for _ in range(batches)]
    estimate = ggn_diagonal(model, [{"input_ids": case.inputs.float()}] * batches, seed=3)
    assert estimate.observations == batches * len(case.inputs)
    # Rounding of float32, over sums of some hundred products.
    expected = projected_squares(case, roots)
    torch.testing.assert_close(flat(estimate.total.values()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical"])
def test_the_second_moment_of_the_roots_is_the_hessian_in_the_outputs(likelihood):
    """v_i v_j has a variance of at most 3 A_ii A_jj, by Khinchine's inequality as below."""
    draws, z = 200_000, torch.tensor([2.0, 0.0, -1.0])
    roots = random_root(z.expand(draws, 3), likelihood, torch.Generator().manual_seed(0)).double()
    factor = output_factor(likelihood, z.double())
    sizes = factor.diagonal().sqrt()
    error = (roots.T @ roots / draws - factor) / torch.outer(sizes, sizes)
    assert error.abs().max() < 5 * (3 / draws) ** 0.5  # 2 %


@of_every_case
def test_root_ggn_averages_to_the_diagonal_of_the_ggn(case):
    """An entry of a draw is the square of a linear form x of random signs, of which Khinchine's
    inequality says E[x^4] <= 3 E[x^2]^2: the relative variance of a draw is at most 2."""
    draws = 1000
    model = case.model()
    estimate = ggn_diagonal(model, [{"input_ids": case.inputs.float()}] * draws, seed=3)
    assert estimate.observations == draws * len(case.inputs)
    diagonal = flat(estimate.total.values()) / estimate.observations
    exact = case.ggn(model).diagonal()
    torch.testing.assert_close(diagonal, exact, rtol=5 * (2 / draws) ** 0.5, atol=0)


@of_every_case
def test_the_curvature_added_to_ivon_averages_to_the_diagonal_of_the_ggn(case):
    """The same draws and bound; with a beta2 near 1, h is their plain mean."""
    draws = 500
    model = case.model()
    optimizer = IVON(
        model.parameters(),
        lr=0.0,
        ess=NO_NOISE,
        beta2=1 - 1e-6,
        curvature="ggn",
        curvature_every=1,
    )
    for _ in range(draws):
        step(optimizer, case, model)
    exact = case.ggn(model).diagonal()
    tolerance = 5 * (2 / draws) ** 0.5
    torch.testing.assert_close(hess_of(optimizer, model), exact, rtol=tolerance, atol=0)


@of_every_case
def test_ivon_as_published_sees_the_diagonal_of_the_hessian(case):
    """Under antithetic pairs f_i = sum_j H_ij eps_i eps_j sigma_j / sigma_i, of mean H_ii and,
    with one sigma for all, variance H_ii^2 + sum_j H_ij^2."""
    pairs, beta2 = 500, 1 - 1e-5
    model = case.model(torch.float64)  # in float32 the gradients' own rounding would show
    optimizer = IVON(
        model.parameters(),
        lr=0.0,
        ess=1e6,  # at sigma of 1e-3 the fourth derivatives add 1e-6
        hess_init=1.0,
        beta2=beta2,
        weight_decay=0.0,
        mc_samples=2,
        antithetic=True,
    )
    hessian = case.hessian(model)
    for _ in range(pairs):
        step(optimizer, case, model)
    # Every pair adds (1 - beta2) (f - h) to h, which hardly changes: no sigma does.
    seen = (hess_of(optimizer, model) - beta2**pairs) / (1 - beta2**pairs)
    deviation = ((hessian.diagonal().square() + hessian.square().sum(1)) / pairs).sqrt()
    rounding = 1e-3  # of h, a float32 near 1, over the share of h that is new
    away = (seen - hessian.diagonal()).abs() / (5 * deviation + rounding)
    assert float(away.max()) < 1


CENTRE = 0.3  # of the prior in the next two tests


def after_one_step(optimizer, model):
    """Weights, h and precision."""
    precision = flat(optimizer.precision(model.named_parameters()).values())
    return flat(model.parameters()), hess_of(optimizer, model), precision


@of_every_case
def test_a_step_of_ivon_as_published_is_that_of_the_dense_hessian(case):
    """Noise of +-e sees f = ess (h + d) e (H e), up to the square of e, about 1e-8."""
    lr, ess, h, d, beta2 = 0.1, 1e8, 0.5, 0.2, 0.5
    model = case.model(torch.float64)
    mean, hessian = flat(model.parameters()), case.hessian(model)
    gradient = case.gradients(model).mean(0)
    prior = {p: (torch.full_like(p, CENTRE), ess * d) for p in model.parameters()}
    optimizer = IVON(
        model.parameters(),
        lr=lr,
        ess=ess,
        hess_init=h,
        beta2=beta2,
        rescale_lr=False,
        mc_samples=2,
        antithetic=True,
        prior=prior,
    )
    with optimizer.sampled_params(train=True):
        noise = flat(model.parameters()) - mean
        case.loss(model).backward()
    sample(optimizer, case, model)
    optimizer.step()
    f = ess * (h + d) * noise * (hessian @ noise)
    curvature = h + (1 - beta2) * (f - h) + 0.5 * ((1 - beta2) * (f - h)).square() / (h + d)
    moved = mean - lr * (gradient + d * (mean - CENTRE)) / (curvature + d)
    expected = moved, curvature, ess * (curvature + d)
    for ours, exact in zip(after_one_step(optimizer, model), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@of_every_case
def test_a_step_of_ivon_with_the_ggn_is_that_of_the_dense_jacobian(case):
    """The first step is made at the mean, so that nothing but the signs is random."""
    lr, ess, d = 0.1, 30.0, 0.2
    model, dense = case.model(), case.model()
    mean, gradient = flat(model.parameters()), case.gradients(dense).mean(0)
    prior = {p: (torch.full_like(p, CENTRE), ess * d) for p in model.parameters()}
    optimizer = IVON(
        model.parameters(), lr=lr, ess=ess, curvature="ggn", curvature_every=1, prior=prior
    )
    outputs, generator = case.outputs(model).detach(), torch.Generator().manual_seed(0)
    root = random_root(outputs, case.likelihood, generator)  # as `sample` draws it in step 0
    step(optimizer, case, model)
    curvature = projected_squares(case, [root]) / len(case.inputs)
    moved = mean - lr * (gradient + d * (mean - CENTRE)) / (curvature + d)
    expected = moved, curvature, ess * (curvature + d)
    for ours, exact in zip(after_one_step(optimizer, model), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@of_every_case
def test_vogn_sees_the_diagonal_of_the_empirical_fisher(case):
    model = case.model()
    optimizer = VOGN(model.parameters(), lr=0.0, ess=NO_NOISE, beta2=0.0)
    gradients = case.gradients(model)
    model.float()
    step(optimizer, case, model)
    fisher = gradients.square().mean(0)
    # Rounding of float32, over some ten operations an entry.
    torch.testing.assert_close(hess_of(optimizer, model), fisher, rtol=1e-5, atol=1e-7)


@of_every_case
def test_bsam_ascends_along_the_dense_hessian(case):
    """The gradient at m + rho g / s is g + rho H g / s up to rho^2; s follows sqrt(s) |g|."""
    rho, hess, decay, damping = 1e-3, 0.5, 0.1, 0.01
    model = case.model()
    optimizer = BSAM(
        model.parameters(),
        lr=0.0,
        ess=NO_NOISE,
        hess_init=hess,
        beta1=0.0,
        beta2=0.0,
        weight_decay=decay,
        rho=rho,
        damping=damping,
    )
    weights, hessian = flat(model.parameters()), case.hessian(model)
    gradient = case.gradients(model).mean(0)
    model.float()
    step(optimizer, case, model)
    momentum = flat(optimizer.state[p]["momentum"] for p in model.parameters())
    ascent = (momentum - gradient - decay * weights) * (hess + decay) / rho
    # The third derivatives times rho, and float32's rounding over rho.
    torch.testing.assert_close(ascent, hessian @ gradient, rtol=0.01, atol=2e-4)
    expected = (hess + decay) ** 0.5 * gradient.abs() + damping
    torch.testing.assert_close(hess_of(optimizer, model), expected, rtol=1e-5, atol=1e-7)


OPTIMIZERS = {
    "IVON, price": lambda p, **kw: IVON(
        p, rescale_lr=False, beta2=0.999, mc_samples=2, antithetic=True, **kw
    ),
    "IVON, ggn": lambda p, **kw: IVON(p, curvature="ggn", curvature_every=1, beta2=0.9, **kw),
    "VOGN": lambda p, **kw: VOGN(p, beta2=0.9, **kw),
    "bSAM": lambda p, **kw: BSAM(p, beta2=0.9, rho=0.0, **kw),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", EXACT)
def test_every_optimizer_finds_the_exact_mean_of_a_linear_regression(name, optimizer):
    """Its step is zero where H (m - b) + d m is zero, whatever its h; samples of a quadratic have
    the gradient of their mean, which is the mean's at an ess without noise."""
    case, decay = CASES[name], 0.2
    model = case.model()
    made = OPTIMIZERS[optimizer](model.parameters(), lr=0.2, ess=1e12, weight_decay=decay)
    for _ in range(250):
        step(made, case, model)
    mean, _ = case.posterior(1e12, decay)
    weights = flat(model.parameters())
    torch.testing.assert_close(weights, mean, rtol=1e-4, atol=1e-5)  # sigma is 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_ivons_posterior_of_a_linear_regression_is_the_exact_ones_diagonal(name):
    """The best diagonal Gaussian has the diagonal of the exact precision."""
    case, ess, decay, steps = CASES[name], 30.0, 0.2, 1000
    model = case.model()
    kw = {"curvature": "ggn", "curvature_every": 1, "mc_samples": 2, "antithetic": True}
    optimizer = IVON(model.parameters(), lr=0.1, ess=ess, beta2=0.999, weight_decay=decay, **kw)
    for _ in range(steps):
        step(optimizer, case, model)
    mean, precision = case.posterior(ess, decay)
    # Pairs cancel the noise of a quadratic's gradient, so the mean is exact.
    torch.testing.assert_close(flat(model.parameters()), mean, rtol=1e-4, atol=1e-5)
    ours = flat(optimizer.precision(model.named_parameters()).values())
    # The mean of 1,000 draws with weights 0.999^age, and relative variance of at most 2 each.
    weights = 0.999 ** torch.arange(steps, dtype=torch.float64)
    deviation = (2 * weights.square().sum()).sqrt() / weights.sum()
    torch.testing.assert_close(ours, precision.diagonal(), rtol=5 * float(deviation), atol=0)
