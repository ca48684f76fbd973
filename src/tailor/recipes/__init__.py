"""Whole jobs as straight-line stories that name the steps in order."""
