"""Measures of routing, of expert similarity and of embeddings, and of their collapse."""

from moe_lib.metrics.embedding import EmbeddingQuality, embedding_quality
from moe_lib.metrics.routing import (
    Load,
    RoutingEntropy,
    class_expert_matrix,
    information_class_null,
    load,
    routing_entropy,
)
from moe_lib.metrics.similarity import (
    aligned_similarity,
    expert_cka,
    linear_cka,
    output_similarity,
    pairwise_similarity,
    similarity_floor,
)
from moe_lib.metrics.task import TaskScore, calibration_error, task_score

__all__ = [
    "EmbeddingQuality",
    "Load",
    "RoutingEntropy",
    "TaskScore",
    "aligned_similarity",
    "calibration_error",
    "class_expert_matrix",
    "embedding_quality",
    "expert_cka",
    "information_class_null",
    "linear_cka",
    "load",
    "output_similarity",
    "pairwise_similarity",
    "routing_entropy",
    "similarity_floor",
    "task_score",
]
