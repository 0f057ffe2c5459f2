"""mixattn beside other engines on the CPU, in turns: ``make bench-peers``, or ``python -m bench.peers``.

Every contender is a process of its own, in its own environment (``setup.sh`` makes them), and does the workloads of
``workloads.py`` once per round; rounds go through all contenders before the next begins, so that a drift of the machine
meets all alike. The table has medians over the rounds, and their range in the records. Contenders and the reasons for
their settings are in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.lib.measure import Record, append_json, timing_of
from bench.peers.workloads import UNITS
from mixattn import env

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_PROMPTS, _DECODES = "prefill_512,prefill_2048", "decode_1,decode_8,decode_32"
_SERVING = "offline,stall"


@dataclass(frozen=True)
class Contender:
    """One engine in one configuration.

    Args:
        label: what the table calls it; several contenders of one label are rows of workloads that it does best.
        group: ``exact`` (float32 arithmetic on the model's own values) or ``rounded``.
        environment: whose Python runs it, a folder of the peers'; "" is this repository's.
        driver: the file in this folder.
        arguments: of the driver; ``{peers}`` is the peers' folder.
        workloads: with commas.
    """

    label: str
    group: str
    environment: str
    driver: str
    arguments: tuple[str, ...]
    workloads: str


def contenders(*, with_compiled: bool) -> list[Contender]:
    """Everybody, in the order of their turns."""
    ours = [
        ("exact", "exact", ()),
        ("int8 activations", "rounded", ("--activation-dtype=int8", "--kv-cache-dtype=bfloat16")),
    ]
    made = []
    for name, group, arguments in ours:
        label = f"mixattn, {name}"
        made.append(
            Contender(label, group, "", "mixattn_driver.py", arguments, f"{_PROMPTS},{_DECODES},offline")
        )  # fmt: skip
        made.append(Contender(label, group, "", "mixattn_driver.py", ("--budget=48", *arguments), "stall"))
    for form, group, kv in (("f32", "exact", ("--kv=f32",)), ("int8", "rounded", ())):
        made.append(
            Contender(
                f"OpenVINO, {form}",
                group,
                "openvino",
                "openvino_driver.py",
                (f"--model={{peers}}/openvino-{form}", *kv),
                f"{_PROMPTS},{_DECODES},{_SERVING}",
            )
        )
    for form, group in (("f32", "exact"), ("q8_0", "rounded"), ("q4_0", "rounded")):
        model = f"--model={{peers}}/gguf/{form}.gguf"
        for flash, streams, workloads in (("1", "1", _PROMPTS), ("0", "32", _DECODES)):
            arguments = (model, f"--flash-attention={flash}", f"--streams={streams}")
            made.append(Contender(f"llama.cpp, {form}", group, "llama", "llama_driver.py", arguments, workloads))
    vllm = [("vLLM, f32 eager", ())] + [("vLLM, f32 compiled", ("--compile",))] * with_compiled
    for label, options in vllm:
        arguments = ("--model={peers}/huggingface", *options)
        made.append(
            Contender(label, "exact", "vllm", "vllm_driver.py", arguments, f"{_PROMPTS},{_DECODES},{_SERVING}")
        )  # fmt: skip
    return made


def run(contender: Contender, peers: Path) -> list[tuple[str, float]]:
    """(workload, value) of each sample; says so on stderr and gives none if the contender fails."""
    python = peers / contender.environment / "bin" / "python" if contender.environment else Path(sys.executable)
    command = [str(python), contender.driver, contender.workloads]
    command += [argument.format(peers=peers) for argument in contender.arguments]
    threads = str(env.num_threads())
    variables = {**os.environ, "OMP_NUM_THREADS": threads}
    if contender.environment:
        variables.pop("PYTHONPATH", None)
        if contender.driver != "vllm_driver.py":
            command.append(f"--threads={threads}")
        else:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{env.num_threads() - 1}"
            variables["LD_PRELOAD"] = ":".join(_preloads(peers))
    else:
        del variables["OMP_NUM_THREADS"]
        variables["PYTHONPATH"] = str(_ROOT)
    done = subprocess.run(command, cwd=_HERE, env=variables, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"workload"')]
    if done.returncode != 0:
        print(f"{contender.label} failed ({done.returncode}): {done.stderr[-2000:]}", file=sys.stderr, flush=True)
    return [(line["workload"], line["value"]) for line in lines]


def _preloads(peers: Path) -> list[str]:
    """What vLLM's documentation asks to be loaded first, if it is there."""
    libraries = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    tcmalloc = [line.split()[-1] for line in libraries.splitlines() if "libtcmalloc_minimal.so.4 " in line]
    return [*tcmalloc[:1], *map(str, (peers / "vllm" / "lib").glob("libiomp5.so"))]


def table(samples: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]) -> str:
    """Medians, a row per contender and a column per workload.

    Args:
        samples: by (group, label), the samples of each workload.
    """
    width = max(len(label) for _, label in samples)
    names = [name for name in UNITS if any(name in found for found in samples.values())]
    lines = [" " * width + "".join(f"{name.replace('_', ' '):>17}" for name in names)]
    lines.append(" " * width + "".join(f"{UNITS[name]:>17}" for name in names))
    for group in sorted({group for group, _ in samples}):
        lines.append(group)
        for (of_group, label), found in samples.items():
            if of_group == group:
                cells = [
                    f"{statistics.median(found[name]):17.4g}" if found.get(name) else " " * 16 + "-" for name in names
                ]
                lines.append(f"{label:{width}}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("PEERS", _ROOT / ".peers")))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="contenders whose label contains one of these, with commas")
    parser.add_argument("--with-compiled", action="store_true", help="vLLM under torch.compile as well")
    parser.add_argument("--json", type=Path, help="append the records to this file, one JSON line each")
    args = parser.parse_args()
    chosen = [
        contender
        for contender in contenders(with_compiled=args.with_compiled)
        if any(part in contender.label for part in args.only.split(","))
    ]
    samples: dict[tuple[str, str], dict[str, list[float]]] = {}
    for round_idx in range(args.rounds):
        for contender in chosen:
            print(f"round {round_idx + 1}: {contender.label}: {contender.workloads}", file=sys.stderr, flush=True)
            found = samples.setdefault((contender.group, contender.label), {})
            for workload, value in run(contender, args.peers.resolve()):
                found.setdefault(workload, []).append(value)
    print(table(samples))
    records = [
        Record(
            f"peers-{workload}",
            label,
            group,
            timing_of(values),
            0,
            0,
            None,
            {"unit": UNITS[workload], "values": values},
        )
        for (group, label), found in samples.items()
        for workload, values in found.items()
    ]
    append_json(args.json, records)


if __name__ == "__main__":
    main()
