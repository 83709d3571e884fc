"""Reports: comparisons and studies as tables and sentences on the terminal, and as one HTML file.

Nothing is imported here, so that the terminal does not load the libraries of the page.
"""
