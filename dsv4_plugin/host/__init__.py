"""The only floor that imports sglang: it makes a stock SGLang serve DeepSeek-V4 with this package's
model."""
