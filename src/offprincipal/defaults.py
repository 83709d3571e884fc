"""Defaults that several rooms share, each once; light, so that the command line shows them without the libraries."""

RANK_FRACTION = 0.125  # of min(rows, columns): the principal subspace's directions
DENSITY = 0.5  # of a matrix: what a mask holds
NULL_DRAWS = 4  # Gaussian updates behind each isotropic null
TOLERANCE = 1e-3  # of singular values, relative
EXACT_UP_TO = 256  # min(rows, columns) up to which LAPACK is as fast as anything
BATCHES, PROMPTS_PER_BATCH, MAX_NEW_TOKENS = 16, 16, 40  # of the gates
DRAWS, LAYER_DRAWS = 8, 2  # random directions of each kind, over all matrices and in each
STEPS, BATCH, LEARNING_RATE, SEED, RANK = 80, 240, 1e-5, 0, 8  # of training; the rank is LoRA's
