"""Warnings from a posterior's health numbers, with thresholds for the short runs of a fine-tune."""

import logging
from collections.abc import Mapping

from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.ranks import is_main

logger = logging.getLogger(__name__)

# Health numbers of the optimizer that the training log shows, by `curvature`. The others have no
# meaning under `ggn`.
LOGGED = {
    "price": ("kappa", "init_fraction", "sigma_over_rms", "hess_noise"),
    "ggn": ("sigma_over_rms",),
}
# Above this share of the weights noise costs accuracy (docs/experiments.md, on calibration); what
# `damping` chooses stays below.
_LOUD = 0.2


def problems(config: FinetuneConfig, health: Mapping[str, float], *, final: bool) -> dict[str, str]:
    """Describe what is wrong and what to do about it, by the name of the health number.

    `kappa`, `hess_noise` and `init_fraction` matter only where IVON's own Hessian is stored: the
    final estimate of `posterior: flush` replaces it.

    Args:
        config: Settings of the run.
        health: Numbers of `IVON.health` and of `precision_health`.
        final: Also judge the numbers whose value means something only at the end of training.
    """
    texts = {}
    if config.posterior == "ivon":
        if final and health["init_fraction"] > 0.5:
            texts["init_fraction"] = (
                f"{health['init_fraction']:.0%} of hess_init is still in the Hessian: lower beta2 "
                "or train longer"
            )
        if health["kappa"] > 1:
            texts["kappa"] = (
                f"kappa is {health['kappa']:.3g}: the batch's noise decides the size of the "
                "Hessian; store posterior: flush or train with curvature: ggn"
            )
        if final and health.get("hess_noise", 0.0) > 1:
            texts["hess_noise"] = (
                f"hess_noise is {health['hess_noise']:.3g}: noise, that from other weights "
                "included, decides the size of the Hessian; store posterior: flush"
            )
    if health.get("sigma_over_rms", 0.0) > _LOUD:
        advice = "damping" if config.curvature == "ggn" else "ess or hess_init"
        texts["sigma_over_rms"] = (
            f"sigma_over_rms is {health['sigma_over_rms']:.3g}: the noise is that many times as "
            f"large as the weights; raise {advice}"
        )
    return texts


class HealthMonitor:
    """Warns once of each problem, while there is still time to stop the run."""

    def __init__(self, config: FinetuneConfig) -> None:
        self._config = config
        self._reported: set[str] = set()

    def warn(self, health: Mapping[str, float]) -> None:
        """Log the problems that were not logged before, on the main process only."""
        for name, text in problems(self._config, health, final=False).items():
            if name not in self._reported and is_main():
                logger.warning(text)
            self._reported.add(name)
