"""The soft nearest neighbor loss and the kernels that compute it."""

from moe_lib.snnl.loss import Combine, LayerwiseSNNL, SNNLConfig, soft_nearest_neighbor_loss

__all__ = ["Combine", "LayerwiseSNNL", "SNNLConfig", "soft_nearest_neighbor_loss"]
