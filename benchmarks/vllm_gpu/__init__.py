"""The sparse kernels and vLLM on an NVIDIA GPU; see ``__main__``."""
