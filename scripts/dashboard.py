"""Compare runs by their `metrics.jsonl`: reward and what explains it, against steps, forwards or seconds.

    python scripts/dashboard.py outputs/one outputs/other --output dashboard.html

Writes one HTML page that opens from disk, without a network or an account: runs can be switched off, curves smoothed,
values read under the pointer. With `--picture FILE.png` some curves are drawn as a picture, too.
`docs/dashboards.md` says how to read them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sharpening import flags
from sharpening.errors import exit_status, require
from sharpening.flags import Flag
from sharpening.running.dashboard import AXES, PICTURED, read_runs, write_page, write_picture

FLAGS = (
    Flag("output", "the page", Path, Path("dashboard.html"), metavar="FILE.html"),
    Flag("against", "the axis that the page begins with, and that of the picture", str, "steps", choices=(*AXES,)),
    Flag("picture", "also draw some curves as a picture", Path, metavar="FILE.png"),
    Flag(
        "curves",
        f"of the picture, named after the runs; unset: those of {', '.join(PICTURED)} that there are",
        nargs="+",
        metavar="NAME",
    ),
)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, and `runs`.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = flags.make_parser(__doc__.splitlines()[0], {"dashboard": FLAGS})
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --output_dir of a run")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Write the page; returns 0.

    Raises:
        UserError: naming the flag or the file and the remedy.
    """
    args = parse_args(argv)
    require(args.picture is not None or not args.curves, "--curves are those of --picture; add it")
    runs = read_runs(args.runs)
    write_page(runs, args.output, args.against)
    print(f"written: {args.output}")
    if args.picture:
        write_picture(runs, args.picture, args.against, args.curves or ())
        print(f"written: {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
