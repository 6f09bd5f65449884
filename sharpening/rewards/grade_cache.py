"""Grades that were paid for, on disk."""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from mllm_template import Template
from sharpening.errors import first_line, reason
from sharpening.files import write_aside
from sharpening.rewards.grades import Grades, grades_of

logger = logging.getLogger(__name__)


class GradeCache:
    """Grades by image, prompt, model, endpoint and template; a damaged entry is warned of and counts as absent.

    Args:
        folder: where they are kept, one JSON file each.
        template: what the grader is told.
        base_url, model: whose grades they are.
    """

    def __init__(self, folder: Path, template: Template, base_url: str, model: str) -> None:
        self.folder, self.template, self.base_url, self.model = folder, template, base_url, model
        self._warned = False  # that grades cannot be kept

    def key(self, image: np.ndarray, prompt: str) -> str:
        """The name of the grades of an image `(H, W, 3)` uint8 for a prompt."""
        told = [self.template.instructions, self.template.aspects, self.template.low, self.template.high]
        asked = json.dumps([self.base_url, self.model, told, prompt, image.shape])
        return hashlib.sha256(asked.encode() + image.tobytes()).hexdigest()

    def recall(self, key: str) -> Grades | None:
        """The grades, or None if there are none, or none that can be read."""
        path = self._path(key)
        try:
            return grades_of(json.loads(path.read_text(encoding="utf-8"))["grades"], self.template)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(f"the grades in {path} cannot be read ({first_line(error)}) and are asked for anew")
            return None

    def keep(self, key: str, prompt: str, reply: str, grades: Grades) -> None:
        """Keep the grades, beside the prompt and the reply for people to read; warn once if that cannot be done."""
        numbers = {**grades.aspects, "overall": grades.overall}
        entry = {"model": self.model, "prompt": prompt, "grades": numbers, "reply": reply}
        try:
            with write_aside(self._path(key), shared=True) as aside:
                aside.write_text(json.dumps(entry, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            if not self._warned:
                logger.warning(f"--cache_dir: grades cannot be kept ({reason(error)}); they will be paid for again")
            self._warned = True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
