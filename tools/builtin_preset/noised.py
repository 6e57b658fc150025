"""Copies of training pairs with noised sources, as Parquet that jobs/finetune.py reads.

    python tools/builtin_preset/noised.py infill --preset .data/untrained_summarizer --copies 4 \
        --input .data/descriptions/train.parquet --text-column description --output .data/infilling
    python tools/builtin_preset/noised.py mask --preset .data/untrained_translator --copies 5 --split-by language \
        --input .data/translation/train.parquet --text-column source --target-column target --output .data/masked_pairs

`infill` is BART's text infilling (spans of tokens become one <mask> each; the target is the text itself), `mask` hides
single tokens and keeps the pair's target. One epoch over N copies is N epochs with fresh noise. Columns: source, target
and that of --split-by, which also names the files. Equal arguments write equal files.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

Noise = Callable[[NDArray[np.int64], np.random.Generator], NDArray[np.int64]]

MASK = "<mask>"
CHUNK_ROWS = 4096


def infill(mask_id: int, share: float, mean_span: float = 3.0) -> Noise:
    """Replace spans of Poisson(mean_span) tokens, `share` of the text in all, by one <mask> each (arXiv:1910.13461,
    2.2). Spans of length 0 insert a <mask>.
    """

    def apply(ids: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        spans = max(1, round(share * len(ids) / mean_span))
        lengths = generator.poisson(mean_span, spans)
        starts = generator.integers(0, max(1, len(ids)), spans)
        hidden = np.zeros(len(ids), dtype=bool)
        for start, length in zip(starts, lengths, strict=True):
            hidden[start : start + length] = True
        begins = hidden & ~np.concatenate([[False], hidden[:-1]])
        begins[starts[lengths == 0]] = True
        masked = np.stack([np.where(begins, mask_id, -1), np.where(hidden, -1, ids)], axis=1).ravel()
        return masked[masked >= 0]

    return apply


def mask_tokens(mask_id: int, share: float) -> Noise:
    """Replace a random `share` of the tokens by <mask>."""
    return lambda ids, generator: np.where(generator.random(len(ids)) < share, mask_id, ids)


def noised(table: pa.Table, seed: Sequence[int], args: argparse.Namespace) -> pa.Table:
    """One copy of a chunk of the input."""
    tokenizer = Tokenizer.from_file(str(Path(args.preset) / "tokenizer.json"))
    tokenizer.enable_truncation(args.max_tokens)
    generator = np.random.default_rng(seed)
    noise = {"infill": infill, "mask": mask_tokens}[args.noise](tokenizer.token_to_id(MASK), args.share)
    encodings = tokenizer.encode_batch_fast(table[args.text_column].to_pylist(), add_special_tokens=False)
    rows = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
    sources = [noise(row, generator).tolist() for row in rows]
    columns = {"source": pa.array(tokenizer.decode_batch(sources, skip_special_tokens=False))}
    if args.noise == "infill":
        columns["target"] = pa.array(tokenizer.decode_batch([row.tolist() for row in rows]))
    else:
        columns["target"] = table[args.target_column]
    return pa.table(columns | ({args.split_by: table[args.split_by]} if args.split_by else {}))


def inputs(path: Path, split_by: str | None) -> Iterator[tuple[str, pa.Table]]:
    """The tables to noise, each with the name of its file."""
    table = pq.read_table(path)
    if split_by is None:
        yield "train", table
        return
    for value in sorted(set(table[split_by].to_pylist())):
        yield value, table.filter(pc.equal(table[split_by], value))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("noise", choices=["infill", "mask"])
    parser.add_argument("--preset", required=True, help="whose tokenizer says what a token is")
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory for the files")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--target-column", default="summary")
    parser.add_argument("--split-by", help="column whose values get a file each")
    parser.add_argument("--share", type=float, default=0.1, help="of the tokens that are hidden")
    parser.add_argument("--max-tokens", type=int, default=510, help="longer sources are cut")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes below are the parallelism
    with ProcessPoolExecutor() as pool:
        for number, (name, table) in enumerate(inputs(args.input, args.split_by)):
            starts = range(0, len(table), CHUNK_ROWS)
            chunks = [table.slice(start, CHUNK_ROWS).combine_chunks() for start in starts] * args.copies
            seeds = [(args.seed, number, chunk) for chunk in range(len(chunks))]
            copies = pool.map(noised, chunks, seeds, [args] * len(chunks))
            first = next(copies)
            with pq.ParquetWriter(args.output / f"{name}.parquet", first.schema, compression="zstd") as writer:
                for copy in chain([first], copies):
                    writer.write_table(copy)
            print(f"{args.output / name}.parquet: {len(table) * args.copies} pairs", flush=True)


if __name__ == "__main__":
    main()
