"""A built-in preset's tokenizer and shape with random weights, for jobs/finetune.py to train from nothing.

    python tools/builtin_preset/untrained.py debian_summarizer_en --output .data/untrained_summarizer

docs/fine-tuning.md has the commands that train both.
"""

import argparse

import torch

from s2s_ray import Seq2SeqLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    Seq2SeqLM.from_preset(args.preset, load_weights=False).save_to_preset(args.output)


if __name__ == "__main__":
    main()
