"""mixattn beside the peers: ``python -m bench.peers`` after ``setup.sh`` (``make bench-peers`` does both).

In each round every contender has a process of its own, one after the other, so that a drift of the machine meets all of
them; the table shows medians over the rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.lib.measure import append_json, parser
from bench.lib.quality import TEXT
from bench.peers import table, workloads
from bench.peers.contenders import Contender, command, contenders, variables
from bench.peers.drive import MARK, ROWS
from mixattn.config import EngineConfig
from mixattn.models.loader import load_model

_REFERENCE = "mixattn-auto"
_LIMIT_S = 900.0
"""A process that takes longer has failed."""


class PeerError(RuntimeError):
    """A contender's process did not end well; the message holds the end of what it wrote."""


def rows_of(arguments: list[str], environment: str | None) -> list[table.Row]:
    """The rows that a driver prints.

    Raises:
        PeerError: it could not start, failed or took too long.
    """
    try:
        done = subprocess.run(
            arguments,
            cwd=workloads.ROOT,
            env=variables(environment),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(str(error)) from error
    if done.returncode != 0:
        raise PeerError(f"exit status {done.returncode}\n" + "\n".join(done.stderr.splitlines()[-12:]))
    return [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]


def engine_rows(contender: Contender, chosen: set[str], text: Path) -> list[table.Row]:
    """A round of one contender; its start is the first process's."""
    rows: list[table.Row] = []
    for run in contender.runs:
        wanted = [row for row in run.rows if row in chosen]
        if not wanted:
            continue
        module = f"bench.peers.{contender.module}"
        arguments = (*run.arguments, "--rows", *wanted, "--text", str(text))
        found = rows_of(command(contender.environment, module, arguments), contender.environment)
        rows += found if not rows else found[1:]
    return [{**row, "backend": contender.name, "dtype": contender.dtype} for row in rows]


def mixattn_attention_rows(folder: Path) -> list[table.Row]:
    """mixattn and torch, from the existing benchmark, with the roof's time of each case."""
    out = folder / "attention.jsonl"
    out.unlink(missing_ok=True)
    cases = [case.name for case in workloads.attention_cases()]
    arguments = ("--cases", *cases, "--dtypes", *workloads.ATTENTION_DTYPES, "--json", str(out))
    rows_of(command(None, "bench.kernels.bench_mixed_attention", arguments), None)
    rows = []
    for record in map(json.loads, out.read_text().splitlines()):
        median_us = record["timing"]["median_us"]
        row = {"case": record["case"], "backend": record["backend"], "dtype": record["dtype"], "us": median_us}
        rows.append({**row, "roof_us": record["share_of_roof"] * median_us, "roofs": record["extra"]["roofs"]})
    return rows


def vllm_attention_rows() -> list[table.Row]:
    """vLLM's operator over the same tensors."""
    return rows_of(command("vllm", "bench.peers.vllm_attention", ()), "vllm")


def write_text(path: Path) -> None:
    """The token ids of the quality row's text, so that all read the same."""
    tokenizer = load_model(EngineConfig("smollm2"), show_progress=False).tokenizer
    path.write_text(json.dumps(tokenizer.encode(TEXT.read_text())))


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.set_defaults(repeats=3, json=workloads.ROOT / "bench" / "out" / "peers.jsonl")
    args_parser.add_argument("--compiled", action="store_true", help="also vLLM compiled: one round, minutes to start")
    args_parser.add_argument("--only", nargs="+", help="contenders whose name starts with one of these")
    args_parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*ROWS, "attention"],
        default=[*ROWS, "attention"],
        help="kinds of rows",
    )
    args = args_parser.parse_args()
    chosen = set(args.rows)
    takes_part = [c for c in contenders(args.compiled) if not args.only or c.name.startswith(tuple(args.only))]
    rows: list[table.Row] = []
    attention: list[table.Row] = []
    load: list[float] = []
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.json")
        for round_idx in range(args.repeats):
            load.append(round(os.getloadavg()[0], 2))
            print(f"round {round_idx + 1} of {args.repeats}, load average {load[-1]}", file=sys.stderr)
            for contender in takes_part:
                # Quality is the same in every round: nothing is random.
                wanted = chosen - ({"quality"} if round_idx else set())
                if (contender.is_once and round_idx) or contender.name in failures:
                    continue
                print(f"  {contender.name}", file=sys.stderr, flush=True)
                try:
                    rows += engine_rows(contender, wanted, folder / "text.json")
                except PeerError as error:
                    failures[contender.name] = str(error)
            if "attention" in chosen and "attention" not in failures:
                print("  attention", file=sys.stderr, flush=True)
                try:
                    attention += mixattn_attention_rows(folder)
                    attention += vllm_attention_rows()
                except PeerError as error:
                    failures["attention"] = str(error)
    records = table.aggregate(rows, load, _REFERENCE)
    attention_records = table.aggregate(attention, load, _REFERENCE)
    classes = {
        "exact: weights as stored, float32 arithmetic": [c.name for c in takes_part if c.is_exact],
        "quantised: weights, or activations too": [c.name for c in takes_part if not c.is_exact],
    }
    print(f"{args.repeats} rounds, {workloads.NUM_THREADS} threads, load average at their starts: {load}")
    if records:
        print("\n".join(table.engine_lines(records, classes)))
    if attention_records:
        print("\n".join(table.attention_lines(attention_records)))
    append_json(args.json, [*records, *attention_records])
    for failed, message in failures.items():
        print(f"{failed} failed: {message}", file=sys.stderr)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
