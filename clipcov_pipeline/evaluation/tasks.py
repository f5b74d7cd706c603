"""The evaluation tasks and the metrics that each one gives, as CLIP_benchmark names them."""

from typing import Literal

# what an evaluation task gives, as CLIP_benchmark names it
METRICS: dict[str, tuple[str, ...]] = {
    "retrieval": tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)),
    "zeroshot_names": ("acc1", "acc5", "mean_per_class_recall"),
    "zeroshot_classification": ("acc1", "acc5", "mean_per_class_recall"),
    "linear_probe": ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
    "knn": ("knn_acc1",),  # CLIP_benchmark has none
}

Ties = Literal["expected", "clip_benchmark", "miss"]
"""What a tie of right and wrong answers counts: its expected value in a random order, what torch.topk makes
of it (CLIP_benchmark's way), or a miss."""

EvaluationTask = Literal["retrieval", "zeroshot_names", "zeroshot_classification", "linear_probe", "knn"]

SHARDS_TASKS = ("retrieval", "zeroshot_names")

BENCHMARK_TASKS = ("retrieval", "zeroshot_classification", "linear_probe", "knn")

TRAINED_TASKS = ("linear_probe", "knn")  # these read the folder's train split too
