"""Commands on finished artifacts: look into one, unpack it, put other weights into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.errors import VerificationError
from sparsify.options import Json, Overwrite, Trust, TrustEngine


def decompress_command(
    artifact: Annotated[Path, typer.Argument(help="Folder that --target onnx --compress wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write an ONNX ARTIFACT with packed weights as a dense one, for runtimes or memories that cannot unpack it."""
    from sparsify.bench.report import size
    from sparsify.console import print_json, print_line, progress_bars
    from sparsify.decompress import decompress
    from sparsify.files import folder_bytes

    with progress_bars() as progress:
        decompress(artifact, out, overwrite=overwrite, progress=progress)
    before, after = folder_bytes(artifact), folder_bytes(out)
    if json:
        print_json({"out": str(out), "bytes": after, "packed_bytes": before})
    else:
        print_line(f"{out}: dense, {size(after)} (packed {size(before)})")


def refit_command(
    artifact: Annotated[Path, typer.Argument(help="Folder that --target tensorrt --engine refit=on wrote.")],
    checkpoint: Annotated[Path, typer.Argument(help="The same model pruned again, with the same pattern.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")],
    trust_engine: TrustEngine = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Put the weights of CHECKPOINT into the TensorRT engines of ARTIFACT, without building them again."""
    from sparsify.console import print_json, print_line, progress_bars
    from sparsify.refit import refit

    with progress_bars() as progress:
        body = refit(
            artifact,
            checkpoint,
            out,
            overwrite=overwrite,
            trust_engine=trust_engine,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json:
        print_json({"out": str(out), "tensorrt": body["tensorrt"], "parity": body["parity"]})
    else:
        print_line(f"{out}: engines refitted")


def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="Folder with a sparsify.json.")],
    recipe: Annotated[bool, typer.Option("--recipe", help="Print the recipe as YAML, to run it again.")] = False,
    linears: Annotated[bool, typer.Option("--linears", help="List every pruned linear.")] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Describe an artifact and verify it: file hashes, the pattern of every linear, exact zeros."""
    from sparsify.console import errors, print_json, print_line, print_table, progress_bars

    if recipe:
        import yaml

        from sparsify import manifest

        body = manifest.read(artifact)
        print_line(yaml.safe_dump({"model": body["source"]["name"], **body["recipe"]}, sort_keys=False).rstrip())
        return
    from sparsify.verify import verify

    with progress_bars() as progress:
        body, problems = verify(artifact, trust_remote_code=trust_remote_code, progress=progress)
    if json:
        print_json({"artifact": str(artifact), "verified": not problems, "problems": problems, "manifest": body})
    else:
        covered = body["coverage"]
        print_table(
            ("", str(artifact)),
            [
                ("kind", body["kind"]),
                ("source", f"{body['source'].get('name')} ({body['source'].get('model_type')})"),
                ("pattern", f"{body['recipe'].get('pattern')} by {body['recipe'].get('method')}"),
                ("linears pruned", str(len(body["linears"]))),
                (
                    "zeros",
                    f"{covered['zeros']:,} of {covered['selected']:,} ({covered['zero_share']:.1%} of the model)",
                ),
                ("files", str(len(body["files"]))),
                ("verified", "yes" if not problems else f"NO: {len(problems)} problems"),
            ],
        )
        if linears:
            print_table(
                ("linear", "shape", "pattern", "zeros", "relative error", "objective", "status"),
                [
                    (
                        row["name"],
                        f"{row['shape'][0]} x {row['shape'][1]}",
                        row["pattern"],
                        f"{row['zeros'] / (row['shape'][0] * row['shape'][1]):.4%}",
                        f"{row['relative_error']:.5f}",
                        _change(row),
                        row.get("status", ""),
                    )
                    for row in body["linears"]
                ],
            )
    if problems:
        for problem in problems[:20]:
            errors().print(f"problem: {problem}", highlight=False, soft_wrap=True, markup=False)
        raise VerificationError(f"{artifact}: {len(problems)} problems; export or prune it again")


def _change(row: dict[str, Any]) -> str:
    """The solver's objective before and after, of a row of the manifest."""
    before, after = row.get("objective_before"), row.get("objective")
    if not isinstance(before, float) or not isinstance(after, float):
        return ""
    return f"{before:.5f} → {after:.5f}"
