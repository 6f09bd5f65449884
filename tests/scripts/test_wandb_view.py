"""`scripts/wandb_view.py`: what reaches W&B's server, which is a local one here."""

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sharpening.running.metric_names import GROUPS, MEANING
from tests.support.runs import ROOT

KEY = "0123456789abcdef" * 2 + "01234567"  # as long as a real one
VIEWER = {"id": "u", "username": "me", "entity": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
SAVED = {"data": {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}}}
NO_PROJECT = {"errors": [{"message": "project not found"}], "data": {"upsertView": None}}


@contextmanager
def server_of_views(answer):
    """The address of a server that knows one user and answers who wants to save a view; and what it was sent."""
    views = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply = {"data": {"viewer": VIEWER}}
            if b"upsertView" in body:
                views.append(json.loads(body)["variables"])
                reply = answer
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", views
    finally:
        server.shutdown()
        server.server_close()


def run(tmp_path, *words, url="http://127.0.0.1:1", key=KEY):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_BASE_URL": url, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"WANDB_API_KEY": key} if key else {}
    command = [sys.executable, str(ROOT / "scripts" / "wandb_view.py"), *words]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)


def test_a_view_has_every_curve_against_one_axis(tmp_path):
    with server_of_views(SAVED) as (url, views):
        result = run(tmp_path, "team/project", "--against", "seconds", "--name", "mine", url=url)
    assert result.returncode == 0, result.stderr
    assert f"{url}/team/project?nw=abc" in result.stderr
    (view,) = views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "project", "mine")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["first looks", *GROUPS, "pictures"]
    assert [section["isOpen"] for section in sections] == [True] + [False] * (len(GROUPS) + 1)
    charts = [panel["config"] for section in sections[:-1] for panel in section["panels"]]
    assert {chart["xAxis"] for chart in charts} == {"cost/seconds"}
    drawn = {name for chart in charts for name in chart.get("metrics", ())}
    assert drawn == MEANING.keys() - {"cost/seconds"}
    pictures = json.dumps(sections[-1])
    assert all(f'"{name}"' in pictures for name in ("branches/best", "branches/worst", "validation/images"))
    assert "branches/table" in pictures
    patterns = [chart["metricRegex"] for chart in charts if chart.get("metricRegex")]
    assert any(re.fullmatch(pattern, "reward/component/clip") for pattern in patterns)


@pytest.mark.parametrize(
    ("answer", "key", "said"),
    [
        (NO_PROJECT, KEY, "team/project: the view was not saved"),
        (SAVED, "", "run `wandb login`"),
    ],
)
def test_what_was_not_saved_is_one_sentence(tmp_path, answer, key, said):
    with server_of_views(answer) as (url, _):
        result = run(tmp_path, "team/project", url=url, key=key)
    assert result.returncode == 2 and "Traceback" not in result.stderr and KEY not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert said in line


@pytest.mark.parametrize("name", ["project", "a/b/c", "team/", "/project"])
def test_a_project_is_named_with_its_entity(tmp_path, name):
    result = run(tmp_path, name)
    assert result.returncode == 2 and "write it as ENTITY/PROJECT" in result.stderr
