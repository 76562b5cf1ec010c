"""Released DeepSeek-V4 checkpoints: their names, their files, and how they become parameters."""
