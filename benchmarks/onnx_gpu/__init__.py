"""ONNX Runtime and TensorRT on an NVIDIA GPU; see ``__main__``."""
