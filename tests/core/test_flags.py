"""A flag is declared once: parser, range, presets, older switches, secrets, help and the page of flags."""

import importlib

import pytest

from sharpening.errors import UserError
from sharpening.flags import (
    Flag,
    as_markdown,
    every_flag,
    make_parser,
    parse,
    public,
    redact,
    refuse_moved,
)
from sharpening.run_flags import RUN_FLAGS
from tests.support.runs import SCRIPTS

GROUPS = {
    "first": (
        Flag("preset", "which defaults", default="paper", choices=("paper", "released"), free=True),
        Flag("scale", "of something", float, range="[0, inf)", presets={"paper": 5.0, "released": 1.0}),
        Flag("through", "keep 100% of it", bool, presets={"paper": False, "released": True}),
        Flag(
            "noise",
            "of branches",
            choices=("fresh", "shared"),
            presets={"paper": "fresh", "released": "fresh"},
            switch=("share", "shared"),
        ),
    ),
    "second": (
        Flag("count", "how many", int, 3, "[1, inf)", free=True),
        Flag("limit", "at most", int, range="[1, inf)"),
        Flag("name", "of it", required=True),
        Flag("key", "a secret", secret=True),
        Flag("quick", "a switch", bool, False),
        Flag("old", "a switch that is on", bool, True),
    ),
}


def parsed(*argv):
    return parse("about", GROUPS, ["--name=x", *argv])


def test_defaults_and_types_are_those_declared():
    args = parsed()
    assert (args.scale, args.through, args.noise, args.count, args.limit) == (5.0, False, "fresh", 3, None)
    assert (args.key, args.quick, args.old) == (None, False, True)
    args = parsed("--count=7", "--scale", "2", "--key=k")
    assert (args.count, args.scale, args.key) == (7, 2.0, "k") and type(args.count) is int


def test_preset_sets_what_is_not_given():
    released = parsed("--preset=released")
    assert (released.scale, released.through) == (1.0, True)
    explicit = parsed("--preset=released", "--scale=3", "--no-through")
    assert (explicit.scale, explicit.through) == (3.0, False)


def test_a_switch_can_be_turned_off_and_the_last_word_wins():
    assert parsed("--quick").quick is True
    assert parsed("--quick", "--no-quick").quick is False
    assert parsed("--no-quick", "--quick").quick is True
    assert parsed("--no-old").old is False


def test_an_older_switch_means_a_value_of_its_flag():
    for given in (["--share"], ["--noise=shared"], ["--noise=shared", "--share"]):
        assert parsed(*given).noise == "shared"
    assert parsed("--no-share").noise == parsed().noise == "fresh"
    assert parsed("--noise=shared", "--no-share").noise == "shared"  # off, it says nothing
    with pytest.raises(UserError, match="--share and --noise=fresh exclude each other; leave one of them out"):
        parsed("--share", "--noise=fresh")
    assert "share" not in vars(parsed("--share"))


@pytest.mark.parametrize(
    ("flag", "value", "must"),
    [
        (Flag("f", type=int, range="[1, inf)"), 0, "be at least 1, or left out"),
        (Flag("f", type=int, default=2, range="[1, inf)"), 0, "be at least 1"),
        (Flag("f", type=float, default=2.0, range="[0, inf)"), -0.1, "not be negative"),
        (Flag("f", type=float, default=2.0, range="(0, inf)"), 0.0, "be above 0"),
        (Flag("f", type=float, default=1.0, range="(0, inf]"), 0.0, "be above 0"),
        (Flag("f", type=float, default=1.0, range="[0, 1]"), 1.5, "lie in [0, 1]"),
        (Flag("f", type=float, default=0.5, range="[0, 1)"), 1.0, "lie in [0, 1)"),
        (Flag("f", type=float, default=0.5, range="(0, 1]"), 0.0, "lie in (0, 1]"),
        (Flag("f", type=float, default=0.5, range="[0, 1]"), float("nan"), "lie in [0, 1]"),
    ],
)
def test_number_out_of_range_is_refused_with_its_flag_and_range(flag, value, must):
    with pytest.raises(UserError) as refusal:
        flag.check(value)
    assert str(refusal.value) == f"--f is {value}, but it must {must}"


@pytest.mark.parametrize(("range", "inside"), [("[1, inf)", 1), ("(0, inf]", float("inf")), ("[0, 1]", 1), ("", -5)])
def test_ends_of_a_range_and_unset_flags_pass(range, inside):
    flag = Flag("f", type=float, range=range)
    flag.check(inside)
    flag.check(None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--count=0"], "--count is 0, but it must be at least 1"),
        (["--limit=0"], "--limit is 0, but it must be at least 1, or left out"),
        (["--scale=-1"], "--scale is -1.0, but it must not be negative"),
        (["--count=many"], "--count: invalid int value: 'many'; see --help for every flag"),
        (["--noise=loud"], "invalid choice: 'loud'"),
        (["--coun=3"], "unrecognized arguments: --coun=3"),
        (["--no-count"], "unrecognized arguments: --no-count"),
    ],
)
def test_wrong_command_line_is_answered_in_one_sentence(argv, said):
    with pytest.raises(UserError) as refusal:
        parsed(*argv)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_required_flag_is_asked_for():
    with pytest.raises(UserError, match="required: --name"):
        parse("about", GROUPS, [])


def test_help_shows_every_flag_with_its_facts():
    shown = " ".join(make_parser("about", GROUPS).format_help().split())
    assert "keep 100% of it" in shown and "of something (paper: 5.0; released: 1.0; in [0, inf))" in shown
    assert "how many (default: 3; in [1, inf))" in shown and "--share means shared" in shown
    assert "--quick, --no-quick" in shown and "a switch (" not in shown  # off is no fact


def test_secrets_are_redacted_in_both_spellings_and_left_out_of_public():
    argv = ["train.py", "--key", "K1", "--key=K2", "--name=x", "--count", "3"]
    assert redact(argv, GROUPS) == ["train.py", "--key", "***", "--key=***", "--name=x", "--count", "3"]
    args = parsed("--key=K")
    assert "key" not in public(args, GROUPS) and public(args, GROUPS)["name"] == "x"
    args.made_up = 1
    assert "made_up" not in public(args, GROUPS)


def test_moved_flags_are_refused_in_every_spelling_with_their_place():
    for argv in (["--mode", "fast"], ["--mode=fast"], ["--count=1", "--mode"]):
        with pytest.raises(UserError, match="--mode is no flag of this script any more: see other"):
            refuse_moved(argv, {"mode": "see other.py"})
    refuse_moved(["--name", "mode", "--modes=1"], {"mode": "see other.py"})


@pytest.fixture(params=["SFT", "RLHF"])
def groups(request):
    return importlib.import_module(SCRIPTS[request.param].removesuffix(".py")).FLAGS


def test_page_of_flags_has_each_flag_once(groups):
    for some in (groups, GROUPS):
        rows = [line for line in as_markdown(some).splitlines() if line.startswith("| `--")]
        names = [row.split("`")[1] for row in rows]
        assert names == [f"--{name}" for name in every_flag(some)] and len(names) == len(set(names))
        assert all(row.count(" | ") == 3 for row in rows)
    table = as_markdown(GROUPS)
    assert "### second" in table and "| `--name` | of it | required |  |" in table
    assert "| `--scale` | of something | paper: 5.0, released: 1.0 | [0, inf) |" in table
    assert "`--share` means shared" in table


def test_every_flag_is_declared_once_and_says_what_it_does(groups):
    flags = [flag for some in groups.values() for flag in some]
    assert len({flag.name for flag in flags}) == len(flags)
    silent = {flag.name for flag in flags if not flag.help}
    assert {name for name in silent if not name.startswith("adam_")} == set()
    for flag in flags:
        for value in (flag.default, *flag.presets.values()):
            assert value is None or not flag.choices or value in flag.choices, flag.name
            flag.check(value)


def test_presets_are_those_that_can_be_chosen(groups):
    flags = every_flag(groups)
    assert {tuple(flag.presets) for flag in flags.values() if flag.presets} == {flags["preset"].choices}


def test_secrets_and_free_flags_are_those_that_change_no_computation():
    flags = every_flag(RUN_FLAGS)
    assert {name for name, flag in flags.items() if flag.secret} == {"hub_token"}
    free = {name for name, flag in flags.items() if flag.free}
    assert {"score_batch_size", "train_rows", "max_train_steps", "output_dir", "gradient_checkpointing"} <= free
    bound = {"learning_rate", "snr_gamma", "train_batch_size", "use_lora", "resolution", "max_grad_norm"}
    assert not bound & free
