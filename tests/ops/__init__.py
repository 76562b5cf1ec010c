"""Operators against formulas written a second time: per token, in Python loops or float64, from
docs/model.md."""
