"""What tests of the evaluation share: prompts, and two models to compare."""

PROMPTS = ["a red circle on a white background", "a blue square on a gray background"]


def both(folder):
    """`--models` of the two pipelines in a folder."""
    return ("base", folder / "model0"), ("other", folder / "model1")
