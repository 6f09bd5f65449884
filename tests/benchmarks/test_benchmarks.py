"""The benchmarks measure what they say: the literal reading learns what the scripts do, counts follow the method."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import branches, grading, naive, startup, step
from sharpening import sdxl
from sharpening.errors import UserError
from sharpening.trajectory import Schedule, branch_error, score_branches, select
from tests.support.objective import gradient, problem
from tests.support.runs import ROOT
from tiny_world.make_tiny_sdxl import make_pipeline
from train_rlhf_diffusion_sharpening_sdxl import preference_loss, rlhf_losses
from train_sft_diffusion_sharpening_sdxl import sft_losses

ARGS = SimpleNamespace(
    backprop_through_sampler=True, branch_target="noise", snr_gamma=None, beta_dpo=2500.0, reward_margin_scale=1.0,
    reward_margin="inside", train_on="pair",
)  # fmt: skip


@pytest.mark.parametrize("method", ["SFT", "RLHF"])
@pytest.mark.parametrize(("n", "m", "t"), [(2, 1, 981), (3, 3, 400), (3, 3, 41)], ids=["m = 1", "whole", "ends early"])
def test_literal_reading_has_the_loss_and_the_gradient_of_the_scripts(method, n, m, t):
    pipeline = make_pipeline(seed=0)
    unet, condition, x_0, eps, start = problem(pipeline, 1, n, torch.float32, torch.tensor([t]), size=8)
    reference = make_pipeline(seed=1).unet.requires_grad_(False) if method == "RLHF" else None
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(25)
    walked = naive.walk(
        unet, pipeline.vae, scheduler, lambda images: step.brightness(images, []),
        condition.rows(torch.zeros(n).long()), x_0, eps, t, m, reference,
    )  # fmt: skip
    expected = naive.sft_loss(*walked[:2]) if method == "SFT" else naive.rlhf_loss(*walked, ARGS.beta_dpo)
    expected.backward()
    expected_gradient = gradient(unet)
    unet.zero_grad()

    schedule = Schedule.from_config(pipeline.scheduler.config, 25)
    unconditional = sdxl.Unconditional(torch.zeros_like(condition.embeds), torch.zeros_like(condition.pooled))

    def model_of(rows):
        return sdxl.branch_model(unet, condition.rows(rows // n), unconditional, 1.0)

    def judge(latents, rows):
        images = sdxl.decode_latents(pipeline.vae, latents, 4)
        return lambda: (step.brightness(images, []), {})

    x_t = schedule.add_noise(x_0, eps, start)
    scores = score_branches(model_of, judge, schedule, x_t, start, m, 2, keep_path=True)
    selection = select(scores.rewards[None], scores.active[None])
    torch.testing.assert_close(selection.branch_reward[0], walked[0], rtol=0, atol=1e-5)
    best, worst = selection.best, selection.worst
    if method == "SFT":
        rows, loss = best, torch.zeros(1)
        steps = sft_losses(
            ARGS, *model_of(rows), schedule, x_t[rows], start[rows], x_0[rows], eps[rows], scores.active[rows]
        )
    else:
        rows = torch.cat([best, worst])
        path = [point.rows(rows) for point in scores.path]
        target = {"x_0": x_0[rows], "eps": eps[rows], "kind": "noise", "snr_gamma": None}
        with torch.no_grad():
            errors = [branch_error(schedule, point, point.output, **target) for point in path]
            outputs = [sdxl.predict_output(reference, point.x, point.t, condition.rows(rows // n)) for point in path]
            theirs = [
                branch_error(schedule, point, output, **target) for point, output in zip(path, outputs, strict=True)
            ]
        active = torch.stack([point.active for point in path], 1)[None]
        rewards = selection.branch_reward[:, rows]
        preference = preference_loss(
            ARGS, torch.stack(errors, 1)[None], torch.stack(theirs, 1)[None], active, rewards, torch.tensor([True])
        )
        loss = preference.loss
        steps = rlhf_losses(
            ARGS, *model_of(rows), schedule, x_t[rows], start[rows], x_0[rows], eps[rows],
            preference.weights.flatten(0, 1),
        )  # fmt: skip
    total = sum(steps)
    total.backward()
    assert float(total if method == "SFT" else loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(gradient(unet), expected_gradient, rtol=1e-3, atol=1e-5 * expected_gradient.abs().max())


def run(name, *flags):
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "rlhf"])
def test_step_benchmark_counts_the_work_of_the_method(method, tmp_path):
    """In forwards, backwards and decodes of a row."""
    output = tmp_path / "step.json"
    result = run(
        "step", "--model", "tiny", "--method", method, "--rounds", 2, "--num_noisy_latents", 4, "--output", output,
        "--latents_per_prompt", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(output.read_text())
    pipeline = make_pipeline(seed=0)
    _, condition, x_0, _, _ = problem(pipeline, 1, 1, torch.float32, size=8)
    trained = flops_of(lambda: naive.forward(pipeline.unet, x_0, 5, condition).sum().backward())
    with torch.no_grad():
        forward = flops_of(lambda: naive.forward(pipeline.unet, x_0, 5, condition))
        decode = flops_of(lambda: pipeline.vae.decode(x_0))
    n, m, steps = 4, 3, 25
    generated, compared, pair = (steps, 2 * m, 2) if method == "rlhf" else (0, 0, 1)
    expected = {
        "script": (generated + n * m + compared) * forward + pair * m * trained + n * m * decode,
        "plain": trained,
        "branch_step": forward + decode,
        "score": n * m * forward,
    }
    assert {name: found["flops"][name] for name in expected} == {
        name: pytest.approx(count, rel=0.002) for name, count in expected.items()
    }
    # Through the sampler a later step's gradient reaches the first layer's input, too.
    literal = ((n * steps + n * m if method == "rlhf" else 0) * forward) + n * m * (trained + decode)
    assert 1 <= found["flops"]["naive"] / literal < 1.03
    assert found["peak_bytes"]["script"] < found["peak_bytes"]["naive"]
    for seconds, phases in zip(found["seconds"]["script"], found["phases"], strict=True):
        assert seconds == pytest.approx(sum(phases.values()))
        assert {"score", "decode", "reward", "train", "optimizer"} <= set(phases)
        assert (method == "rlhf") == ("generate" in phases) == ("reference" in phases)
    assert "cores" in found["machine"] and "torch" in found["machine"]
    assert "against naive: " in result.stdout and "against plain: " in result.stdout


@pytest.mark.slow
def test_step_benchmark_takes_the_configurations_of_the_scripts():
    switches = ["--use_lora", "--gradient_checkpointing", "--decoder", "tiny", "--mixed_precision", "bf16"]
    result = run("step", "--model", "tiny", "--method", "rlhf", "--rounds", 1, "--batch", 2, *switches)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_cost_of_branches_is_a_line_through_them():
    result = run("branches", "--model", "tiny", "--rounds", 2, "--n", 1, 4, "--m", 1, 2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line.split()[:2] for line in result.stdout.splitlines() if line.endswith("GiB")] == [
        ["1", "1"], ["1", "2"], ["4", "1"], ["4", "2"],
    ]  # fmt: skip
    assert "a branch and step more costs" in result.stdout


@pytest.mark.slow
def test_start_up_is_timed():
    result = run("startup", "--images", 12, "--rounds", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "12 images prepared in" in result.stdout and "found prepared by a second start" in result.stdout
    assert result.stdout.count("--help: ") == result.stdout.count("--dry_run: ") == 2


@pytest.mark.slow
def test_grader_that_works_meanwhile_is_set_against_one_that_is_waited_for():
    result = run("grading", "--rounds", 2, "--seconds", 0.2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "0.2 s a grade" in result.stdout and "of the time of waiting at every step" in result.stdout


@pytest.mark.parametrize("benchmark", [step, branches, startup, grading])
def test_benchmark_says_in_one_sentence_what_is_wrong(benchmark):
    with pytest.raises(UserError, match="--rounds is 0, but it must be at least 1"):
        benchmark.main(["--rounds", "0"])
