"""The paper's MLLM grader as a reward: the grade that a vision chat model gives the image for its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_template import Template, load_template
from sharpening.errors import require
from sharpening.flags import Flag

if TYPE_CHECKING:
    from torch import Tensor

    from sharpening.rewards.grader import Failure
    from sharpening.rewards.grades import Grades

FLAGS = (
    Flag("mllm_model", "model of the mllm reward at its endpoint", default="gpt-4o"),
    Flag("mllm_template", "grading scheme: of mllm_template, or a file", default="five_aspects"),
    Flag("mllm_score", "overall grade, or mean of the aspects", default="overall", choices=("overall", "mean")),
    Flag("mllm_concurrency", "requests under way at once, per process", int, 8, "[1, inf)", free=True),
    Flag("mllm_timeout", "seconds for one request", float, 60.0, "(0, inf]", free=True),
    Flag("mllm_max_retries", "tries after the first, for one image", int, 3, "[0, inf)", free=True),
    Flag("mllm_max_calls", "stop after this many requests, retries included", int, range="[1, inf)", free=True),
    Flag("base_url", "endpoint of the mllm reward; unset: OPENAI_BASE_URL or OpenAI's own"),
    Flag("api_key", "key of the mllm reward; the environment variable OPENAI_API_KEY is safer", secret=True),
)


class MLLMReward:
    """The grade that a vision chat model gives the image for its prompt (the paper's MLLM grader, section 4.1).

    Range: [0, 1]: the overall score, or the mean of the aspects, mapped from the template's scale. The aspects are
    logged on their own, on that same range. An image that could not be graded has no score: `--reward_failure` decides
    whether that stops the run or only leaves its branch out of the selection.

    Args:
        model: name at the endpoint (`--mllm_model`, or `mllm:MODEL` in the spec).
        template: `--mllm_template`, a scheme of `mllm_template/` or a file.
        score: `--mllm_score`, "overall" or "mean" (of the aspects, if the template has any).
        concurrency, timeout, max_retries, max_calls: see `sharpening.rewards.grader.Limits`.
        base_url, api_key: see `sharpening.rewards.grader.Endpoint`.
        cache_dir: grades are kept in its `diffusion_sharpening/mllm_grades`; None is the hub library's cache.

    Raises:
        UserError: naming the flag, if the template is malformed, or the endpoint refuses the key or is out of reach.
    """

    def __init__(
        self,
        model: str,
        template: str,
        score: str,
        concurrency: int,
        timeout: float,
        max_retries: int,
        max_calls: int | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.template, self.score = parse_template(template, score), score
        from huggingface_hub.constants import HF_HOME

        from sharpening.rewards.grader import Endpoint, Grader, Limits

        self.grader = Grader(
            self.template,
            Endpoint(model, base_url, api_key),
            Limits(concurrency, timeout, max_retries, max_calls),
            Path(cache_dir or HF_HOME).expanduser() / "diffusion_sharpening" / "mllm_grades",
        )

    def get_reward(self, images: Tensor, prompts: list[str]) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
        """Begin to grade; what is returned waits for the scores and the aspects."""
        from sharpening.rewards.preprocessing import to_uint8

        wait = self.grader.begin(to_uint8(images), prompts)
        return lambda: self._scores(wait())

    def _scores(self, outcomes: Sequence[Grades | Failure]) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        from sharpening.rewards.calling import RowsFailed
        from sharpening.rewards.grader import Failure

        reasons = {row: outcome.reason for row, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
        low, high = self.template.low, self.template.high
        parts = {name: torch.full((len(outcomes),), torch.nan) for name in (*self.template.aspects, "overall")}
        for row, outcome in enumerate(outcomes):
            if row not in reasons:
                for name, value in {**outcome.aspects, "overall": outcome.overall}.items():
                    parts[name][row] = (value - low) / (high - low)
        overall = parts.pop("overall")
        total = overall if self.score == "overall" else torch.stack(list(parts.values())).mean(dim=0)
        if reasons:
            raise RowsFailed((total, parts), reasons)
        return total, parts


def parse_template(template: str, score: str) -> Template:
    """The template of the flags `--mllm_template` and `--mllm_score`.

    Raises:
        UserError: naming the flag, if there is none, it is malformed, or it has no aspects to take the mean of.
    """
    found = load_template(template)
    require(
        bool(found.aspects) or score != "mean",
        f"--mllm_score mean needs aspects, and --mllm_template {template} has none; leave --mllm_score out",
    )
    return found
