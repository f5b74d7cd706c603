"""Held-out pairs of an index, as open_clip_train evaluates a model on them."""

from collections.abc import Iterator

import numpy as np
import torch

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.training.samples import Refused, Samples, Wanted


class HeldOutPairs:
    """What open_clip_train takes for a DataLoader: batches of (images, tokens) in the index's order.

    num_samples: of a pass. Made in the training's own process: they are few, and are kept once read.
    """

    def __init__(self, samples: Samples, n_rows: int, batch_size: int) -> None:
        self._samples, self._batch_size = samples, batch_size
        self.num_samples = n_rows

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches.

        Raises:
            InputError: a shard is gone or is not as it was.
        """
        for first in range(0, self.num_samples, self._batch_size):
            rows = np.arange(first, min(first + self._batch_size, self.num_samples))
            made = self._samples.__getitems__(Wanted(rows, rows))
            if isinstance(made, Refused):
                raise InputError(made.message)
            yield made.images, made.texts
