from refluence.gradients.kernels import cross_grams, gram_matrices, pairs

__all__ = ["cross_grams", "gram_matrices", "pairs"]
