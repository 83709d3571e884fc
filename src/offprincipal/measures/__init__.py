"""What is measured of one matrix before and after: changes, location, spectra; the columns, their meaning and pooling.

Used alike by comparisons, by the monitor and by Gate III, so that one name means one thing. Knows nothing of files.
"""
