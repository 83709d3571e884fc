"""Gates: the links of the theory, each measured with an estimator of its own."""
