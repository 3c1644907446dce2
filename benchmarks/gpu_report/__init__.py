"""The hardware report of an NVIDIA GPU; see ``__main__``."""
