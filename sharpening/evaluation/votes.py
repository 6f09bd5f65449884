"""Counts the files of votes that `vote.html` saves: who was preferred to whom, and how sure that is."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sharpening.errors import UserError, require
from sharpening.evaluation.blind_study import key_name
from sharpening.evaluation.comparison import Z95
from sharpening.evaluation.report import aligned

CHOICES = ("left", "right", "tie")


class Ballot(NamedTuple):
    """One voter's file: a choice for each of the first pairs of the study."""

    study: str
    voter: str
    votes: list[str]


class Preference(NamedTuple):
    """How often the images of one model were preferred to those of another, ties counting a half."""

    first: str
    second: str
    wins: int  # of the first
    ties: int
    losses: int
    rate: float
    low: float  # bounds of the 95% interval
    high: float


def read_ballot(path: Path) -> Ballot:
    """A file that `vote.html` saved.

    Raises:
        UserError: naming the file.
    """
    try:
        ballot = Ballot(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = "it cannot be read" if isinstance(error, OSError) else "it is damaged or of another kind"
        raise UserError(f"--votes {path} is no file of votes ({reason}); save it again from vote.html") from error
    texts = [ballot.study, ballot.voter, *ballot.votes] if isinstance(ballot.votes, list) else [None]
    sound = all(isinstance(text, str) for text in texts) and ballot.study.isalnum() and {*ballot.votes} <= {*CHOICES}
    require(sound, f"--votes {path} is no file of votes (its content is damaged); save it again from vote.html")
    return ballot


def read_key(path: Path, ballot: Ballot, folder: Path | None) -> Mapping[str, Any]:
    """The key of a ballot's study: in `folder`, or beside the ballot's file `path`.

    Raises:
        UserError: there is none, or it is damaged, or the ballot has more votes than the study has pairs.
    """
    name = key_name(ballot.study)
    places = [path.parent] if folder is None else [folder, path.parent]
    file = next((place / name for place in places if (place / name).is_file()), None)
    require(
        file is not None,
        f"--votes {path} belongs to study {ballot.study}, whose {name} is not in {' or '.join(map(str, places))}; "
        "name with --output_dir the folder in which evaluate.py wrote vote.html",
    )
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
        sound = all({pair["left"], pair["right"]} <= {*key["models"]} for pair in key["pairs"])
    except (ValueError, KeyError, TypeError):
        sound = False
    require(sound, f"{file} is damaged; write it again with the evaluate.py command that made vote.html")
    require(
        len(ballot.votes) <= len(key["pairs"]),
        f"--votes {path} holds {len(ballot.votes)} votes, but its study has {len(key['pairs'])} pairs; save it again "
        "from vote.html",
    )
    return key


def wilson(share: float, count: int) -> tuple[float, float]:
    """Bounds of the 95% score interval of a share of `count` trials (Wilson 1927)."""
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * (share * (1 - share) / count + Z95**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def preferences(key: Mapping[str, Any], ballots: Sequence[Ballot]) -> list[Preference]:
    """For every two models that were voted on: the later of `--models` against the earlier, which may be the base.

    The interval is Wilson's of the rate, with ties counted a half, which makes it a little too wide. It takes votes
    for independent: two voters on the same pairs say less than twice as many pairs.
    """
    counted: Counter[tuple[str, str]] = Counter()  # (who won, who lost)
    ties: Counter[frozenset[str]] = Counter()
    for ballot in ballots:
        for pair, choice in zip(key["pairs"], ballot.votes, strict=False):
            left, right = pair["left"], pair["right"]
            if choice == "tie":
                ties[frozenset((left, right))] += 1
            else:
                counted[(left, right) if choice == "left" else (right, left)] += 1
    found = []
    for second, first in itertools.combinations(key["models"], 2):
        wins, losses, drawn = counted[first, second], counted[second, first], ties[frozenset((first, second))]
        votes = wins + losses + drawn
        if votes:
            rate = (wins + drawn / 2) / votes
            found.append(Preference(first, second, wins, drawn, losses, rate, *wilson(rate, votes)))
    return found


def count(files: Sequence[Path], folder: Path | None) -> int:
    """Print the preferences that files of votes add up to; returns the exit status.

    Args:
        folder: where the study's key is, if it is not beside the files.

    Raises:
        UserError: a file is damaged, belongs to another study, or is a voter's second one.
    """
    ballots = [read_ballot(file) for file in files]
    voters: dict[str, Path] = {}
    for file, ballot in zip(files, ballots, strict=True):
        require(
            ballot.study == ballots[0].study,
            f"--votes {file} belongs to study {ballot.study}, but {files[0]} to {ballots[0].study}; count each study "
            "by itself",
        )
        require(
            ballot.voter not in voters,
            f"--votes {file} is of the same voter as {voters.get(ballot.voter)}; leave out the older one",
        )
        voters[ballot.voter] = file
        key = read_key(file, ballot, folder)  # one study has one key
    print(table(preferences(key, ballots), len(ballots), len(key["pairs"])))
    return 0


def table(found: Sequence[Preference], voters: int, pairs: int) -> str:
    """The preferences as text, under what they were counted from."""
    votes = sum(p.wins + p.ties + p.losses for p in found)
    lines = [["models", "votes", "first", "ties", "second", "prefer the first [95%]"]]
    for p in found:
        rate = f"{p.rate:.3f} [{p.low:.3f}, {p.high:.3f}]"
        counts = (p.wins + p.ties + p.losses, p.wins, p.ties, p.losses)
        lines.append([f"{p.first} over {p.second}", *map(str, counts), rate])
    head, *body = aligned(lines, left=1)
    people = f"{voters} voter{'s' if voters > 1 else ''}"
    said = f"{votes} votes of {people} on {pairs} pairs; a tie counts a half"
    return "\n".join([said, "", head, "-" * len(head), *body])
