"""What each form of the weights takes and loses: bytes, perplexity of a fixed text, agreement with exact weights.

Run ``python -m bench.fidelity.bench_quantization smollm2``. The text is bench/data/tide_mill.txt; agreement is the
share of its positions at which the most likely next token is that of ``--quantization none``.
"""

from __future__ import annotations

from bench.lib.measure import parser
from bench.lib.quality import TEXT, greedy_agreement, perplexity, text_logits
from mixattn.config import QUANTIZATIONS, EngineConfig
from mixattn.models.loader import load_model


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("model", nargs="?", default="smollm2")
    args = args_parser.parse_args()
    print(f"{'quantization':14}{'matrices MB':>12}{'perplexity':>12}{'agreement':>11}")
    reference = None
    for quantization in QUANTIZATIONS:
        loaded = load_model(EngineConfig(args.model, dtype="float32", quantization=quantization))
        token_ids = loaded.tokenizer.encode(TEXT.read_text())
        logits = text_logits(loaded, token_ids)
        reference = logits if reference is None else reference
        megabytes = sum(matrix.num_bytes for _, matrix in loaded.model.matrices()) / 1e6
        print(
            f"{quantization:14}{megabytes:12.0f}{perplexity(logits, token_ids):12.4f}"
            f"{greedy_agreement(logits, reference):11.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
