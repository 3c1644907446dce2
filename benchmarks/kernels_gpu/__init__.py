"""The kernels on an NVIDIA GPU; see ``__main__``."""
