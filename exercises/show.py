"""Prints some keys of several runs side by side, a line a step.

    python exercises/show.py grad_norm,kl_ref runs/one runs/other
"""

import json
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Exit code 2 where a run or a key does not exist."""
    if len(argv) < 2:
        print("usage: python exercises/show.py KEY,KEY,… RUN RUN …", file=sys.stderr)
        return 2
    keys, folders = argv[0].split(","), [Path(name) for name in argv[1:]]
    try:
        texts = [(folder / "metrics.jsonl").read_text(encoding="utf-8") for folder in folders]
        runs = [[json.loads(line) for line in text.split("\n")[:-1]] for text in texts]
        columns = [[f"{key} {number}", *("-" if row[key] is None else f"{row[key]:.6g}" for row in rows)]
                   for number, rows in enumerate(runs, 1) for key in keys]
    except OSError as error:
        print(f"error: no such run: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"error: no such key: {error}; there are {', '.join(runs[0][0])}", file=sys.stderr)
        return 2
    print(*(f"{number} = {folder}" for number, folder in enumerate(folders, 1)), sep="\n")
    columns.insert(0, ["step", *(str(row["step"]) for row in runs[0])])
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=False):
        print(*(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
