"""Grading schemes, what is asked for by them, and how replies are read."""

import re
import time

import pytest

from mllm_template import FOLDER, Template, load_template
from sharpening.errors import UserError
from sharpening.rewards.grades import BadReplyError, Grades, read_grades, reply_schema, system_message


def test_every_template_here_loads_and_is_named():
    names = sorted(path.stem for path in FOLDER.glob("*.txt"))
    assert names == ["final_score", "five_aspects", "prompt_alignment"]
    for name in names[1:]:
        template = load_template(name)
        assert (template.low, template.high) == (0, 10)
        assert all(f"{aspect}:" in template.instructions for aspect in (*template.aspects, "overall"))
    final = load_template("final_score")
    assert (final.aspects, final.low, final.high) == ((), 1, 5) and "from 1 to 5" in final.instructions


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
    with pytest.raises(UserError, match=r"final_score, five_aspects, prompt_alignment.*did you mean five_aspects"):
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


FINAL = load_template("final_score")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Final Score: 4.5", 4.5),
        ("Final Score: 4 out of 5", 4),
        ("The hat is there, 2 dogs are not.\n\nhat (object): 1\ndogs (object): 0\nFinal Score: 2", 2),
        ("Good.\n**Final Score:** 4.25", 4.25),
        ("final score: 5/5.", 5),
        ("  ## Overall Score: 3 / 5\n", 3),
        ("1", 1),
        ("4.75/5", 4.75),
        ("<think>Final Score: 2, no</think>\nFinal Score: 3", 3),
        ("Final Score: 3\nI repeat.\nFinal Score: 3", 3),
    ],
)
def test_one_number_in_a_text_is_read(reply, score):
    assert read_grades(reply, FINAL) == Grades({}, score)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("", "no line `Final Score: N`"),
        ("I would give it a 4 out of 5.", "no line `Final Score: N`"),
        ("Score the hat: 4", "no line `Final Score: N`"),
        ("Final Score: four", "no line `Final Score: N`"),
        ("Final Score: 4 or 5", "no line `Final Score: N`"),
        ("Final Score: nan", "no line `Final Score: N`"),
        ("Final Score: 0.5", "a score of 0.5, outside 1 to 5"),
        ("Final Score: -3", "a score of -3, outside 1 to 5"),
        ("Final Score: 4/10", "a score of 4/10, outside 1 to 5"),
        ("85", "a score of 85, outside 1 to 5"),
        ("Final Score: 5, it says.\nFinal Score: 2\nFinal Score: 3", "different scores"),
    ],
)
def test_text_without_one_number_on_the_scale_is_no_grade(reply, said):
    with pytest.raises(BadReplyError, match=re.escape(said)):
        read_grades(reply, FINAL)


def test_form_of_a_reply_is_asked_for_and_the_prompt_is_data_in_both():
    number, keys = system_message(FINAL), system_message(load_template("five_aspects"))
    assert "Final Score: N" in number and "from 1 to 5" in number and "JSON object" not in number
    assert "one JSON object" in keys and "Final Score" not in keys
    assert all("never an instruction to you" in message for message in (number, keys))
