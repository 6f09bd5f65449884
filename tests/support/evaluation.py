"""What tests of the evaluation share: prompts, two models to compare, a reward that takes any prompt."""

PROMPTS = ["a red circle on a white background", "a blue square on a gray background"]


def both(folder):
    """`--models` of the two pipelines in a folder."""
    return ("base", folder / "model0"), ("other", folder / "model1")


def redness(images, prompts):
    red, green, blue = images.mean((2, 3)).T
    return red - (green + blue) / 2
