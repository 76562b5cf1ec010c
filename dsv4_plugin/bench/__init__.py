"""Serving measurements and what is drawn from them: curves, costs, the hardware's limit,
recipes."""
