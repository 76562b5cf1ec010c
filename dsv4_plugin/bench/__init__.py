"""Load measurement of a running server."""
