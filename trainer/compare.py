"""The paired bootstrap: how sure is a gain that two candidates show on the same prompts."""

import numpy as np


def paired_bootstrap(new: np.ndarray, old: np.ndarray, resamples: int, seed: int,
                     level: float = 0.95) -> tuple[float, float, float]:
    """(gain, low, high): the mean of `new` - `old` and its percentile interval over resampled prompts.

    new, old: [prompts], entry i of both belongs to the same prompt. Raises ValueError if they differ in length or are
    empty.
    """
    if new.shape != old.shape or new.ndim != 1 or not len(new):
        raise ValueError(f"paired_bootstrap needs two arrays of the same prompts, got shapes {new.shape}, {old.shape}")
    # prompts with equal differences are exchangeable, so how often each difference is drawn is multinomial
    values, counts = np.unique(new.astype(np.float64) - old.astype(np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(new), counts / len(new), size=resamples)
    low, high = np.quantile(drawn @ values / len(new), [(1 - level) / 2, (1 + level) / 2])
    return float(values @ counts / len(new)), float(low), float(high)
