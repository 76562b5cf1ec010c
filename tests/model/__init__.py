"""The model against another implementation, and its shares against the whole."""
