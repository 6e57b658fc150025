"""Prove an output against its manifest: fingerprint, plan, order, counts, and the digest of every file.

    python jobs/verify.py out/summaries
    python jobs/verify.py s3://bucket/out

Ends with 0, or with 8 and what does not match. Repairs nothing.
"""

import argparse
from collections.abc import Sequence

from s2s_ray.pipelines import command
from s2s_ray.pipelines.publish import verify
from s2s_ray.storage import Location


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="directory that a generate job wrote")
    output = Location.parse(parser.parse_args(argv).output)
    manifest = verify(output)
    print(
        f"{output.url} verifies: {manifest['rows']} rows and {manifest['error_rows']} error rows in "
        f"{len(manifest['parts'])} parts, fingerprint {manifest['fingerprint']}"
    )
    return 0


if __name__ == "__main__":
    command.main(main)
