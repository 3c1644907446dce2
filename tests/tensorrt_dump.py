"""Run by ``test_tensorrt_api`` in a process of its own: prints what a TensorRT module offers as JSON.

Per class, attribute -> first line of its docstring, which pybind fills with the signature; ``members`` are an enum's.
"""

import importlib
import json
import sys


def main(name: str) -> None:
    """Print version and classes of the module ``name``."""
    module = importlib.import_module(name)
    classes = {}
    for attribute in dir(module):
        kind = getattr(module, attribute)
        if isinstance(kind, type):
            docs = {key: (getattr(kind, key).__doc__ or "").strip().partition("\n")[0] for key in dir(kind)}
            classes[attribute] = {"docs": docs, "members": sorted(getattr(kind, "__members__", {}))}
    print(json.dumps({"version": module.__version__, "classes": classes, "names": dir(module)}))


if __name__ == "__main__":
    main(sys.argv[1])
