"""Presets from anywhere into directories and stores, and what they hold.

    python jobs/presets.py list                                          # built-in names, versions in $S2S_RAY_STORE
    python jobs/presets.py show debian_summarizer_en                     # sizes, languages, model card
    python jobs/presets.py import hf://facebook/bart-large-cnn bart_cnn  # any handle to a sealed directory
    python jobs/presets.py publish bart_cnn s3://bucket/store bart_cnn   # prints bart_cnn@1
    python jobs/presets.py verify s3://bucket/store/bart_cnn@1
    python jobs/presets.py export s3://bucket/store/bart_cnn@1 for_transformers --dtype bfloat16

What is printed last is the preset's digest. Exit codes: s2s_ray/errors.py; 7 is a preset that is not what it should be.
"""

import argparse
from collections.abc import Callable, Sequence

from s2s_ray.pipelines import presets
from s2s_ray.pipelines.command import main as run

HANDLE = "a name, directory, URL, hf://, kaggle:// or name@version"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: str, function: Callable[..., str], **arguments: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(command, help=(function.__doc__ or "").splitlines()[0])
        sub.set_defaults(function=function)
        for argument, meaning in arguments.items():
            sub.add_argument(argument, help=meaning)
        return sub

    listing = add("list", presets.list_presets)
    listing.add_argument("store", nargs="?", help="URL of a store; default: $S2S_RAY_STORE")
    add("show", presets.show_preset, handle=HANDLE)
    verify = add("verify", presets.verify_preset, handle=HANDLE)
    verify.add_argument("--digest", help="the digest that the preset must have, 64 hexadecimal digits")
    add("import", presets.import_preset, handle=HANDLE, directory="new directory, or a preset to replace")
    export = add("export", presets.export_preset, handle=HANDLE, directory="new directory, or a preset to replace")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the weights have it")
    publish = add("publish", presets.publish_preset, handle=HANDLE, store="URL of the store", name="name in the store")
    publish.add_argument("--version", type=int, help="this version; default: the next one")
    arguments = vars(parser.parse_args(argv))
    print(arguments.pop("function")(**arguments))
    return 0


if __name__ == "__main__":
    run(main)
