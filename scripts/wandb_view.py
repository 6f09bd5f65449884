"""Save a view of a W&B project: the curves that tell most on top, then every group of curves, against one axis.

    pip install -e '.[wandb-view]'
    python scripts/wandb_view.py ENTITY/PROJECT

Runs log into the project `diffusion-sharpening`. A view is of a project, not of a run, so save it once. It needs an
account and a connection; no run depends on it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sharpening import flags
from sharpening.errors import UserError, exit_status, first_line, require
from sharpening.flags import Flag
from sharpening.running.dashboard import AXES, AXIS_TITLES, PICTURED, TOGETHER
from sharpening.running.metric_names import GROUPS, MEANING, OF_PREFIX

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

FLAGS = (
    Flag("name", "what the view is called", str, "Diffusion-Sharpening"),
    Flag("against", "the axis of every chart", str, "forwards", choices=(*AXES,)),
)
FIRST = ("validation/reward", *PICTURED)
PICTURES, TABLE = ("validation/images", "branches/best", "branches/worst"), "branches/table"


def make_view(entity: str, project: str, name: str, against: str) -> "Workspace":
    """The view, which is not saved yet; against: of `AXES`."""
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser, WeavePanelSummaryTable
    from wandb_workspaces.workspaces import Section, Workspace, WorkspaceSettings

    def chart(name: str) -> LinePlot:
        return LinePlot(title=name, x=AXES[against], title_x=AXIS_TITLES[against], y=[*TOGETHER.get(name, (name,))])

    def charts(prefix: str) -> LinePlot:
        title, pattern = f"{prefix}*", f"{re.escape(prefix)}.*"
        return LinePlot(title=title, x=AXES[against], title_x=AXIS_TITLES[against], metric_regex=pattern)

    sections = [Section("first looks", [chart(name) for name in FIRST], is_open=True)]
    for group in GROUPS:
        panels = [chart(name) for name in MEANING if name.startswith(f"{group}/") and name != AXES[against]]
        panels += [charts(prefix) for prefix in OF_PREFIX if prefix.startswith(f"{group}/")]
        sections.append(Section(group, panels))
    pictures = [MediaBrowser(title=name, media_keys=[name]) for name in PICTURES]
    sections.append(Section("pictures", [*pictures, WeavePanelSummaryTable(table_name=TABLE)]))
    settings = WorkspaceSettings(x_axis=AXES[against])
    return Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, and `project`, a pair of names.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = flags.make_parser(__doc__.splitlines()[0], {"view": FLAGS})
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="as in the address of the project's page")
    args = parser.parse_args(argv)
    names = args.project.split("/")
    require(len(names) == 2 and all(names), f"{args.project} names no project; write it as ENTITY/PROJECT")
    args.project = names
    return args


def main(argv: Sequence[str]) -> int:
    """Save the view, of which W&B's client says where it is; returns 0.

    Raises:
        UserError: what is wrong with the flags, the installation or the connection, with the remedy.
    """
    args = parse_args(argv)
    require(
        find_spec("wandb_workspaces") is not None,
        "a view needs the package wandb-workspaces; install it with pip install -e '.[wandb-view]'",
    )
    view = make_view(*args.project, args.name, args.against)
    try:
        view.save()
    # W&B's client has errors of its own for each kind of failure, which share no base.
    except Exception as error:
        raise UserError(
            f"{'/'.join(args.project)}: the view was not saved ({first_line(error)}); run `wandb login`, and see that "
            "the project is there"
        ) from error
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
