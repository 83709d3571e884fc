"""Defaults that several rooms share, each once; light, so that the command line shows them without the libraries."""

RANK_FRACTION = 0.125  # of min(rows, columns): the principal subspace's directions
DENSITY = 0.5  # of a matrix: what a mask holds
NULL_DRAWS = 4  # Gaussian updates behind each isotropic null
TOLERANCE = 1e-3  # of singular values, relative
