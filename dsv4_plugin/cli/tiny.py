"""Write a small random checkpoint in the released format, with a tokenizer, to serve and test
without the real weights.

Heads have their real geometry (512 = 448 + 64, indexer 128); depth, width and experts are small.
The weights are random, so the answers mean nothing; the same options and seed give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="where to write; must not exist or be empty"
    )
    parser.add_argument(
        "--layers",
        type=int,
        help="backbone layers (default: 6, or one for each of --compress-ratios)",
    )
    parser.add_argument(
        "--compress-ratios",
        type=_ratios,
        metavar="R,R,...",
        help="ratio of each layer, 0, 4 or 128 (default: 0,0 and then 4 and 128 in turn)",
    )
    parser.add_argument(
        "--hidden", type=int, default=256, help="width, a multiple of 128 (default: %(default)s)"
    )
    parser.add_argument(
        "--heads", type=int, default=8, help="attention heads (default: %(default)s)"
    )
    parser.add_argument(
        "--experts", type=int, default=8, help="routed experts (default: %(default)s)"
    )
    parser.add_argument(
        "--experts-per-token", type=int, default=3, help="of them per token (default: %(default)s)"
    )
    parser.add_argument(
        "--intermediate",
        type=int,
        default=256,
        help="width of an expert, a multiple of 128, shared among processes in whole blocks of 128"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--index-topk",
        type=int,
        default=64,
        help="compressed entries that a ratio-4 layer attends to (default: %(default)s)",
    )
    parser.add_argument(
        "--dspark",
        action="store_true",
        help="with a DSpark draft of three stages in the place of the MTP block, as the releases"
        " Flash-0731 and Pro-0813",
    )
    parser.add_argument(
        "--base", action="store_true", help="as the Base releases: FP8 experts, fp32 scales"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random weights (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-size",
        type=float,
        metavar="MB",
        help="split the weights into files of at most this many MB, with an index",
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is in DIR")


def _ratios(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of ratios"
        ) from None


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint.tiny import tiny_config, write_tiny
    from ..config import ConfigError

    if arguments.shard_size is not None and arguments.shard_size <= 0:
        raise ConfigError(f"--shard-size is {arguments.shard_size:g} MB; it must be above 0")
    ratios = arguments.compress_ratios
    layers = (
        arguments.layers if arguments.layers is not None else (6 if ratios is None else len(ratios))
    )
    config = tiny_config(
        layers=layers,
        hidden=arguments.hidden,
        heads=arguments.heads,
        experts=arguments.experts,
        experts_per_token=arguments.experts_per_token,
        intermediate=arguments.intermediate,
        index_topk=arguments.index_topk,
        expert_dtype="fp8" if arguments.base else "fp4",
        compress_ratios=ratios,
        dspark_stages=3 if arguments.dspark else 0,
    )
    write_tiny(
        arguments.directory,
        config,
        arguments.seed,
        None if arguments.shard_size is None else int(arguments.shard_size * 1e6),
        arguments.force,
        print,
    )
    size = sum(path.stat().st_size for path in arguments.directory.iterdir())
    print(f"{arguments.directory}: {config['num_hidden_layers']} layers, {size / 1e6:.1f} MB")
    return 0
