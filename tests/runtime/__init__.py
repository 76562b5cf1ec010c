"""The engine: golden answers, chunks, batches, and mistakes that must show."""
