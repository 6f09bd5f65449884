"""HTML pages of one file: a template, filled. Styles, scripts and data lie in the page itself."""

import base64
from pathlib import Path
from typing import Any

from sharpening.files import write_aside

EMBED_LIMIT = 16 * 2**20  # bytes of all images together that a page holds as they are


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Fill a template, whose folder holds what it includes, and write it whole or not at all; text in `values` is
    escaped. NaN cannot be in `data`."""
    import jinja2

    loader = jinja2.FileSystemLoader(template.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = environment.get_template(template.name).render(values)
    with write_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")


def data_uri(image: bytes, kind: str = "png") -> str:
    """An image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
