"""What each form of weights and activations takes and loses: bytes, perplexity of a fixed text, agreement.

Run ``python -m bench.fidelity.bench_quantization smollm2``. The text is bench/data/tide_mill.txt; agreement is the
share of its positions at which the most likely next token is that of ``--quantization none``.
"""

from __future__ import annotations

import itertools

from bench.lib.measure import parser
from bench.lib.quality import TEXT, greedy_agreement, perplexity, text_logits
from mixattn.config import ACTIVATION_DTYPES, QUANTIZATIONS, EngineConfig
from mixattn.models.loader import load_model


def main() -> None:
    args_parser = parser(__doc__ or "")
    args_parser.add_argument("model", nargs="?", default="smollm2")
    args = args_parser.parse_args()
    print(f"{'quantization':14}{'activations':12}{'matrices MB':>12}{'perplexity':>12}{'agreement':>11}")
    reference = None
    for quantization, activation_dtype in itertools.product(QUANTIZATIONS, ACTIVATION_DTYPES):
        if quantization == "none" and activation_dtype != "float32":
            continue  # float32 matrices are not multiplied with rounded inputs
        config = EngineConfig(args.model, dtype="float32", quantization=quantization, activation_dtype=activation_dtype)
        loaded = load_model(config)
        token_ids = loaded.tokenizer.encode(TEXT.read_text())
        logits = text_logits(loaded, token_ids)
        reference = logits if reference is None else reference
        megabytes = sum(matrix.num_bytes for _, matrix in loaded.model.matrices()) / 1e6
        print(
            f"{quantization:14}{activation_dtype:12}{megabytes:12.0f}{perplexity(logits, token_ids):12.4f}"
            f"{greedy_agreement(logits, reference):11.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
