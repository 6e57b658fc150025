"""Remove what a finished output's manifest does not refer to: orphaned shards, notes of attempts, temporary files.

    python jobs/clean.py out/summaries --dry-run
    python jobs/clean.py s3://bucket/out

Ends with 0; with 8 if the output is not finished, 6 while a job is at work on it. What verification needs stays.
"""

import argparse
from collections.abc import Sequence

from s2s_ray.pipelines import command
from s2s_ray.pipelines.clean import clean
from s2s_ray.storage import Location


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="directory that a generate job finished")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    arguments = parser.parse_args(argv)
    output = Location.parse(arguments.output)
    found = clean(output, arguments.dry_run)
    for leftover in found:
        print(f"{leftover.path}{'/' if leftover.is_directory else ''}")
    print(f"{output.url}: {len(found)} leftovers {'found' if arguments.dry_run else 'removed'}")
    return 0


if __name__ == "__main__":
    command.main(main)
