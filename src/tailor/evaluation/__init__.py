"""Measures answers on held-out rows, with intervals, and proves that what was trained is what is served."""
