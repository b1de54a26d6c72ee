"""The bitmask layouts of compressed-tensors, restated with numpy from their description.

A weight is an array of integers here (its bits), so that nothing can be lost in a conversion. `bits` has one row per
run along the last dimension, packed little end first and padded to a byte; values stand in row-major order.
"""

import numpy as np


def encode(weight, keep):
    """`sparse-bitmask`: shape, compressed, bitmask, row_offsets."""
    counts = keep.sum(axis=-1)
    return {
        "shape": np.array(weight.shape, dtype=np.int64),
        "compressed": np.array([w for w, k in zip(weight.ravel(), keep.ravel(), strict=True) if k], dtype=weight.dtype),
        "bitmask": np.packbits(keep, axis=-1, bitorder="little"),
        "row_offsets": np.asarray(np.cumsum(counts, axis=0).reshape(counts.shape) - counts, dtype=np.int64),
    }


def encode_24(weight, keep):
    """`sparse-24-bitmask`: shape as a column, two values of every four, bitmask."""
    assert (keep.reshape(-1, 4).sum(axis=1) == 2).all()
    parts = encode(weight, keep)
    return {
        "shape": parts["shape"].reshape(-1, 1),
        "compressed": parts["compressed"].reshape(len(weight), -1),
        "bitmask": parts["bitmask"],
    }


def decode(parts):
    """The weight's bits and the mask, from either layout."""
    shape = tuple(parts["shape"].ravel())
    keep = np.unpackbits(parts["bitmask"], axis=-1, count=shape[-1], bitorder="little").reshape(shape).astype(bool)
    weight = np.zeros(shape, dtype=parts["compressed"].dtype)
    values = iter(parts["compressed"].ravel())
    for position in np.argwhere(keep):
        weight[tuple(position)] = next(values)
    assert next(values, None) is None
    return weight, keep
