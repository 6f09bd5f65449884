"""Best-of-n fine-tuning: the gradient of standard fine-tuning on the chosen samples, of the model or of the base."""

import pytest
import torch

from sharpening import sdxl
from tests.baselines import literal
from tests.support.runs import metrics


@pytest.fixture
def method():
    return "BEST_OF_N"


def plain_fine_tuning(unet, x, t, condition, eps, counted):
    """The mean over all prompts of the error of the noise; a prompt that is not counted has none."""
    rows = [slice(i, i + 1) for i in counted.nonzero().flatten().tolist()]
    errors = [
        torch.nn.functional.mse_loss(sdxl.predict_output(unet, x[row], t[row], condition.rows(row)), eps[row])
        for row in rows
    ]
    return sum(errors) / len(counted)


@pytest.mark.usefixtures("no_result", "in_double")
@pytest.mark.parametrize("train_rows", [1, 3, 100])
@pytest.mark.parametrize("samples_of", ["own", "base"])
def test_loss_and_gradient_are_those_of_standard_fine_tuning_on_the_best(
    samples_of, train_rows, train, flags, world, prompts, seen, tmp_path
):
    """In the second step, where the model has left the base. Of 4 prompts one has samples that earn the same: none of
    them is the best, and it counts as 0 in the mean."""
    body = "return images.mean((1, 2, 3)) * torch.tensor(['triangle' not in prompt for prompt in prompts])"
    options = {**prompts, "reward_model": literal.write_reward(tmp_path, body), "train_batch_size": 4}
    options |= {"learning_rate": 1e-3, "max_grad_norm": 1e9, "infer_steps": 2, "guidance_scale": 3, "sets": 1}
    options |= {"samples_of": samples_of, "train_rows": train_rows}
    assert train(flags(**options, num_noisy_latents=3, max_train_steps=2)) == 0
    rows, draws = literal.drawn(1, 4, 4)
    drawn = literal.noising(draws)
    trained = literal.of(seen, "train", step=1)
    assert [len(part.x) for part in trained] == {1: [1, 1, 1, 1], 3: [3, 1], 100: [4]}[train_rows]
    x, t, condition = literal.together(trained)
    assert torch.equal(t, drawn.t)

    counted = torch.tensor(["triangle" not in literal.CAPTIONS[row] for row in rows])
    unet = literal.unet_with(world.model, seen.updates[1].weights)
    loss = plain_fine_tuning(unet, x, t, condition, drawn.eps[:, 0], counted)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])
    assert (seen.updates[1].gradient - expected).norm() <= 1e-10 * expected.norm()
    _, line = metrics(tmp_path / "run")
    assert line["loss"] * 3 / 4 == pytest.approx(float(loss.detach()), rel=1e-10)  # the curve is over those that count

    # What was noised is the best of the prompt's own three samples.
    generation = 1 if samples_of == "own" else 0
    latents = literal.samples(literal.of(seen, "generate", generation), 2, 3).unflatten(0, (4, 3))
    if samples_of == "base":  # drawn in the order of the first step
        before, _ = literal.drawn(0, 4, 4)
        latents = latents[[before.index(row) for row in rows]]
    rewards = literal.brightness(world.model, latents.flatten(0, 1)).view(4, 3)
    best = latents[torch.arange(4), rewards.argmax(1)]
    chosen = literal.clean(x, t, drawn.eps[:, 0])
    torch.testing.assert_close(chosen[counted], best[counted], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("samples_of", ["own", "base"])
def test_samples_are_those_of_the_model_as_it_is_or_of_the_base(
    samples_of, lora, train, flags, world, prompts, seen, quick
):
    options = {**prompts, **quick, "samples_of": samples_of, "use_lora": lora, "learning_rate": 1e-2}
    assert train(flags(**options, max_train_steps=2)) == 0
    own, base = (literal.put(seen.updates[step].weights, literal.trainable(world.model, lora)) for step in (1, 0))
    drawn = literal.of(seen, "generate", step=1)
    assert drawn
    for part in drawn:
        with torch.no_grad():
            of_own, of_base = (sdxl.predict_output(unet, part.x, part.t, part.condition) for unet in (own, base))
        assert not torch.allclose(of_own, of_base, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part.output, of_own if samples_of == "own" else of_base, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_result")
def test_a_prompt_shown_again_gets_new_samples_of_the_model(train, flags, prompts, seen, quick):
    assert train(flags(**prompts, **quick, train_batch_size=4, max_train_steps=2)) == 0
    first, second = (literal.of(seen, "generate", step)[0].x for step in (0, 1))
    assert first.shape == second.shape and not any(
        torch.allclose(one, other, atol=0.1) for one in first for other in second
    )
