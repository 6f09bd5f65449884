"""What the browser tests rest on: a page's errors and requests are seen."""


def test_errors_and_requests_of_a_page_are_seen(visit, tmp_path):
    (tmp_path / "good.html").write_text("<h1>good</h1><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>")
    good = visit(tmp_path / "good.html")
    assert good.page.inner_text("h1") == "good" and good.errors == good.requests == []
    (tmp_path / "bad.html").write_text("<img src='https://example.org/a.png'><script>nothing.there()</script>")
    bad = visit(tmp_path / "bad.html")
    assert any("nothing is not defined" in error for error in bad.errors)
    assert bad.requests == ["https://example.org/a.png"]
