"""Prints the record as the table of README.md: ``python -m bench.static.table``."""

from __future__ import annotations

import json

from bench.static.contracts import RECORD


def main() -> None:
    print(
        "| case | registers | stack bytes | shared bytes | programs per SM | products of 128 rows "
        "| instructions per MFLOP: 128 rows, full (edge) | 16 rows, full (edge) |\n|" + "---|" * 8
    )
    for name, measured in json.loads(RECORD.read_text())["cases"].items():
        if "loops" not in measured:
            continue
        loops = measured["loops"]
        of_loop = {kind: f"{loop['warp_instructions_per_mflop']:,}" for kind, loop in loops.items()}
        costs = [f"{of_loop.get(kind, '-')} ({of_loop.get(f'{kind}-edge', '-')})" for kind in ("large", "small")]
        cells = (
            name, measured["registers"], measured["stack_bytes"], f"{measured['shared_bytes']:,}",
            measured["programs_per_sm"], " ".join(loops["large"]["matrix"]), *costs,
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
