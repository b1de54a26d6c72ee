"""Gradual pruning, restated from Zhu & Gupta, arXiv 1710.01878, section 3, in plain Python."""

from fractions import Fraction


def sparsity(t, s_i, s_f, t_0, n, delta):
    """Equation 1: `s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³` for t in {t_0, t_0 + Δt, …, t_0 + nΔt}."""
    s_i, s_f = Fraction(str(s_i)), Fraction(str(s_f))
    return s_f + (s_i - s_f) * (1 - Fraction(t - t_0, n * delta)) ** 3


def kept(weights, sparsity, alive):
    """The mask of one pruning step: of those alive, the largest |w| stay; earlier positions win ties."""
    keep = len(weights) - int(sparsity * len(weights))
    order = sorted((i for i in range(len(weights)) if alive[i]), key=lambda i: (-abs(weights[i]), i))
    chosen = set(order[:keep])
    return [i in chosen for i in range(len(weights))]
