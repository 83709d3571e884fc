"""Reports: the tables of a comparison, and the verdicts of a study, in words and as one HTML file.

Nothing is imported here: words for the terminal need none of what draws the page.
"""
