"""Rank image-caption pairs of your own by ClipCov: arrays in, row numbers out. No experiment, no files."""

import numpy as np

from clipcov_pipeline.selection import Pool, objective, rank
from clipcov_pipeline.selection.latent_classes import cluster_labels


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# in place of these: your images' and captions' embeddings by one CLIP model, float16 or float32 [N, d]
rng = np.random.default_rng(0)
topics = rng.standard_normal((20, 64))[rng.integers(0, 20, 2000)]
image, text = (unit(topics + rng.standard_normal((2000, 64))).astype(np.float32) for _ in range(2))

# no class names at hand: cluster; with class prompts, latent_classes.zero_shot_labels
latent_class, label_similarity, _ = cluster_labels(image, text, 20)
pool = Pool.from_arrays(image, text, latent_class, label_similarity)
chosen = rank(pool, budget=0.1)
by_chance = rank(pool, "random", budget=0.1)
value, other = (objective(pool, ranking.rows)["F"] for ranking in (chosen, by_chance))
print(f"{len(chosen)} of {len(pool)} pairs, the first ones are rows {chosen.rows[:5].tolist()}")
print(f"F {value:.1f}, of as many by chance {other:.1f}")
