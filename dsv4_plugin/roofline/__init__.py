"""The least time a step can take on a GPU, from the model's sizes alone, and how far
measurements are from it."""
