"""docs/dashboards.md names every curve as trackers have it, with its name in metrics.jsonl and its meaning."""

import re

from sharpening.running.metric_names import GROUPS, IN_GROUP, MEANING, OF_PREFIX
from tests.support.runs import ROOT

PAGE = ROOT / "docs" / "dashboards.md"


def test_table_of_curves_is_that_of_the_code():
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.read_text().splitlines()]
    table = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in cells if len(row) == 3 and "/" in row[0]}
    in_file = {name: old for old, name in IN_GROUP.items()}
    for name, meaning in MEANING.items():
        assert table[name] == (in_file.get(name, ""), meaning)
        assert name.partition("/")[0] in GROUPS
    starts = tuple(f"`{start}" for start in OF_PREFIX)
    assert [row[2] for row in cells if row[0].startswith(starts) and len(row) == 3] == [*OF_PREFIX.values()]


def test_pictures_are_there_and_small():
    pictures = [PAGE.parent / name for name in re.findall(r"!\[[^]]*]\(([^)]*)\)", PAGE.read_text())]
    assert len(pictures) == 5 and all(picture.is_file() for picture in pictures)
    assert sum(path.stat().st_size for path in (PAGE.parent / "dashboards").iterdir()) < 400_000
    assert len(PAGE.read_text().splitlines()) <= 120
