"""The mathematics of one matrix or one pair of matrices: tensors in, numbers out.

Knows nothing of files, models, layers or runs, and imports nothing of this package but errors and defaults. Start here.
"""
