"""Write `docs/flags.md` from the declarations of the flags: `python scripts/flags_page.py`."""

from importlib import import_module
from pathlib import Path

from sharpening.flags import Groups, as_markdown
from sharpening.run_flags import RUN_FLAGS

SCRIPTS = (
    "train_sft_diffusion_sharpening_sdxl", "train_rlhf_diffusion_sharpening_sdxl", "baselines.diffusion_dpo",
    "baselines.diffusion_dpo_dataset", "baselines.best_of_n", "baselines.ddpo", "baselines.d3po",
)  # fmt: skip
PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
INTRODUCTION = """# Flags

Made by `python scripts/flags_page.py` from where each flag is declared. A flag that is given wins over a preset.
A switch is turned off by `--no-NAME`, also at the end of a line that turned it on.
Flags marked * may be changed when a run is resumed: they change neither which draws a step sees nor what it computes
(but a run's length sets the course of a decaying learning rate). A change of any other is warned of.
"""


def page() -> str:
    """The whole page: the flags of every script first, then what each script has of its own."""
    scripts = {name: import_module(name).FLAGS for name in SCRIPTS}
    general = (*RUN_FLAGS, "reward", "selection")
    shared = {title: flags for title, flags in scripts[SCRIPTS[0]].items() if title in general}
    parts = [INTRODUCTION, "## Every script", as_markdown(shared)]
    for name, groups in scripts.items():
        own: Groups = {title: flags for title, flags in groups.items() if flags is not shared.get(title)}
        parts += [f"## `{name.replace('.', '/')}.py`", as_markdown(own)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
