"""LengthBucketSampler: shuffled batches of samples of similar length, a pure function of (seed, epoch).

Padding is computed like items are, so a batch should hold rows of one length. transformers' own sampler does that
too, but it measures lengths by reading every sample, sends the batches of a bucket longest first, and draws from the
global random state, which an interrupted run cannot rebuild in its second epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class LengthBucketSampler(Sampler[int]):
    """Yields every index once per epoch, in an order whose consecutive `batch_size` indices have similar lengths.

    Samples are shuffled, cut into buckets of `bucket_batches` batches, sorted by length inside a bucket, and the
    batches of the whole epoch are shuffled again. The samples left over when the last batch is short are a random
    draw, so that no length is favoured.

    Args:
        dataset: Anything with `__len__` and `lengths`, one number per sample. Read at the start of each epoch.
        batch_size: Batch size that the loader cuts.
        seed: Together with the epoch the only source of randomness.
        bucket_batches: Batches per bucket; 1 = no bucketing, a plain shuffle.

    Example:
        >>> class Rows(list):
        ...     lengths = [3, 9, 3, 9]
        >>> order = list(LengthBucketSampler(Rows("abcd"), batch_size=2))
        >>> sorted(order), sorted(order[:2]) in ([0, 2], [1, 3])
        ([0, 1, 2, 3], True)
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int = 0, bucket_batches: int = 100) -> None:
        self.dataset = dataset
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.bucket_batches = int(bucket_batches)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch is drawn from (seed, epoch)."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        lengths = np.asarray(self.dataset.lengths)
        order = rng.permutation(len(self.dataset))
        full = len(order) // self.batch_size * self.batch_size
        if full:
            bucket = np.arange(full) // (self.batch_size * self.bucket_batches)
            # stable sort by (bucket, length): equal lengths stay shuffled
            by_length = order[:full][np.lexsort((lengths[order[:full]], bucket))] if self.bucket_batches > 1 else order
            batches = by_length[:full].reshape(-1, self.batch_size)
            order = np.concatenate([rng.permutation(batches).reshape(-1), order[full:]])
        return iter(order.tolist())
