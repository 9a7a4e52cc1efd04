"""When a posterior's health numbers call for a word: the thresholds of IVON's short runs."""

import logging
from collections.abc import Mapping

from mergekit_bayes.finetune.settings import FinetuneConfig

logger = logging.getLogger(__name__)

# Of the optimizer's health numbers, those that the training log shows; under `ggn` the others say
# nothing.
LOGGED = {
    "price": ("kappa", "init_fraction", "sigma_over_rms", "hess_noise"),
    "ggn": ("sigma_over_rms",),
}


def problems(config: FinetuneConfig, health: Mapping[str, float], *, final: bool) -> dict[str, str]:
    """What is wrong, by health number, and what to do; `final` looks at what only the end can tell.

    kappa, the noise number and the share of `hess_init` matter where IVON's own Hessian is stored:
    the flush replaces it.
    """
    found = {}
    if config.posterior == "ivon":
        if final and health["init_fraction"] > 0.5:
            found["init_fraction"] = (
                f"{health['init_fraction']:.0%} of hess_init is still in the Hessian: lower beta2 "
                "or train longer"
            )
        if health["kappa"] > 1:
            found["kappa"] = (
                f"kappa is {health['kappa']:.3g}: the Hessian is mostly noise; lower ess, raise "
                "beta2 or the batch"
            )
        if final and health.get("hess_noise", 0.0) > 1:
            found["hess_noise"] = (
                f"hess_noise is {health['hess_noise']:.3g}: the Hessian's order can be trusted, "
                "its size cannot; "
                "store posterior: flush"
            )
    if health.get("sigma_over_rms", 0.0) > 0.1:
        floor = "weight_decay" if config.curvature == "ggn" else "hess_init"
        found["sigma_over_rms"] = (
            f"the noise reached {health['sigma_over_rms']:.2f} of a tensor's weights: raise ess or "
            f"{floor}"
        )
    return found


class Watch:
    """Warns once of each problem while there is time to stop the run."""

    def __init__(self, config: FinetuneConfig) -> None:
        self._config = config
        self._told: set[str] = set()

    def look(self, health: Mapping[str, float], *, warn: bool) -> None:
        for name, text in problems(self._config, health, final=False).items():
            if warn and name not in self._told:
                logger.warning(text)
            self._told.add(name)
