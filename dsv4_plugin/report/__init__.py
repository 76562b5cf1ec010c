"""Curves of measured and published points, their costs, and the figures and pages that show
them."""
