"""Whether two models' scores of a next token, .npy files, are as near as they are to be: KL in nats."""

from __future__ import annotations

import sys

import numpy as np

from lorasurgery.arrays import Array


def logs(path: str) -> Array:
    """Log-probabilities, float64."""
    scores = np.load(path).astype(np.float64)
    scores -= scores.max()
    found: Array = scores - np.log(np.exp(scores).sum())
    return found


def main() -> None:
    one, two = logs(sys.argv[1]), logs(sys.argv[2])
    divergence = float((np.exp(one) * (one - two)).sum())
    assert divergence < float(sys.argv[3]), divergence
    print(divergence)


if __name__ == "__main__":
    main()
