"""Sessions: an artifact opened in the runtime that serves it."""

from pathlib import Path

from sparsify.runtimes.session import Session


def open_session(path: Path, *, trust_remote_code: bool = False) -> Session:
    """The session that serves the artifact in ``path``: ONNX Runtime where it holds ``model.onnx``, else PyTorch."""
    if (path / "model.onnx").exists():
        from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession

        return OnnxRuntimeSession(path)
    from sparsify.runtimes.torch_session import TorchSession

    return TorchSession(path, trust_remote_code=trust_remote_code)
