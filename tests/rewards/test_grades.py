"""Grading schemes, what is asked for by them, and how replies are read."""

import time

import pytest

from mllm_template import FOLDER, Template, load_template
from sharpening.errors import UserError
from sharpening.rewards.grades import BadReplyError, Grades, read_grades, reply_schema


def test_every_template_here_loads_and_is_named():
    names = sorted(path.stem for path in FOLDER.glob("*.txt"))
    assert names == ["five_aspects", "prompt_alignment"]
    for name in names:
        template = load_template(name)
        assert (template.low, template.high) == (0, 10)
        assert all(f"{aspect}:" in template.instructions for aspect in (*template.aspects, "overall"))


@pytest.mark.parametrize(
    "text",
    ["", "Judge!", "aspects: a\n---\nJudge!", "aspects: a\nscale: 0\n---\nJudge!", "aspects: a\nscale: 10 0\n---\nx",
     "scale: 0 10\n---\nJudge!", "aspects: a b\nscale: 0 10\n---\nx", "aspects: overall\nscale: 0 10\n---\nx",
     "aspects: a\nscale: 0 10\n---\n  "],
)  # fmt: skip
def test_malformed_template_is_one_sentence(text, tmp_path):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(UserError, match=r"--mllm_template .*mine.txt must begin with") as caught:
        load_template(str(tmp_path / "mine.txt"))
    assert "\n" not in str(caught.value)


def test_unknown_template_names_those_there_are():
    with pytest.raises(UserError, match=r"five_aspects, prompt_alignment.*did you mean five_aspects"):
        load_template("five_aspect")


@pytest.mark.parametrize(
    "reply",
    ['{"A one": 1, "b-two": {"Score": "2"}, "OVERALL": 3.0}', 'x {"a_one": 1, "b_two": 2, "overall": 3} {y',
     '{"note": {"deep": [1]}, "grades": {"a_one": 1, "b_two": 2, "overall": " 3 "}}'],
)  # fmt: skip
def test_replies_that_can_be_read(reply, tmp_path):
    (tmp_path / "t.txt").write_text("aspects: a_one, b_two\nscale: 0 10\n---\nx")
    assert read_grades(reply, load_template(str(tmp_path / "t.txt"))) == Grades({"a_one": 1, "b_two": 2}, 3)


def test_reply_of_braces_alone_is_refused_in_reasonable_time():
    started = time.monotonic()
    with pytest.raises(BadReplyError):
        read_grades("{" * 20_000 + '{"a":' * 5_000, load_template("five_aspects"))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('{"a_one": 1, "b_two": 2}', "no number for overall"),
        ('{"a_one": true, "b_two": 2, "overall": 3}', "no number for a_one"),
        ('{"a_one": {"score": null}, "b_two": 2, "overall": 3}', "no number for a_one"),
        ('{"a_one": {"score": [1]}, "b_two": 2, "overall": 3}', "no number for a_one"),
        ('{"a_one": 1, "b_two": "much", "overall": 30}', "no number for b_two"),
        ('{"a_one": 1, "b_two": NaN, "overall": 3}', "no number for b_two"),
        ('{"a_one": 1, "b_two": "-0.5", "overall": 3}', "gives b_two -0.5, outside 0 to 10"),
        ('{"a_one": 1, "b_two": {"score": 11}, "overall": 3}', "gives b_two 11, outside 0 to 10"),
        ('{"a_one": 1, "b_two": 2, "overall": 1' + "0" * 400 + "}", "no number for overall"),
        ("[1, 2]", "no JSON object"),
        ('{"a_one": 1, "b_two": 2, "overall": 3} {"a_one": 1, "b_two": 2, "overall": 4}', "different grades"),
    ],
)
def test_replies_that_are_no_grades_say_which_score_is_at_fault(reply, said):
    with pytest.raises(BadReplyError, match=said):
        read_grades(reply, Template("x", ("a_one", "b_two"), 0, 10))


def test_schema_asks_for_a_justification_before_each_score_and_for_nothing_else():
    schema = reply_schema(Template("x", ("b", "a"), -1, 3))
    aspect = schema["$defs"]["Aspect"]
    assert list(schema["properties"]) == schema["required"] == ["b", "a", "overall"]
    assert list(aspect["properties"]) == aspect["required"] == ["justification", "score"]
    assert schema["additionalProperties"] is aspect["additionalProperties"] is False
    assert schema["properties"]["a"] == {"$ref": "#/$defs/Aspect"}
    for score in (schema["properties"]["overall"], aspect["properties"]["score"]):
        assert (score["type"], score["minimum"], score["maximum"]) == ("number", -1, 3)


def test_any_word_can_be_an_aspect():
    """Some are names that pydantic keeps for itself."""
    names = ("json", "copy", "model_config", "_private", "Score", "justification", "aspect_0")
    reply = "{" + "".join(f'"{name}": {row}, ' for row, name in enumerate(names)) + '"overall": 9}'
    template = Template("x", names, 0, 10)
    assert read_grades(reply, template) == Grades({name: row for row, name in enumerate(names)}, 9)
    assert reply_schema(template)["required"] == [*names, "overall"]
