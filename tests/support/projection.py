"""The tiny problem of the projection studies' tests."""

from refluence.studies.projection.problem import ProblemOptions

OPTIONS = ProblemOptions("digits", "lr", n_train=60, n_test=20, num_test_grads=12, epochs=3, batch_size=16)
