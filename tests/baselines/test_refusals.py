"""What the baselines refuse: one sentence on stderr that names the flag and the remedy, exit status 2."""

import pytest

ANY = {
    "no data": ({"train_data_dir": None}, ["no training data", "--prompts_file"]),
    "prompts and a data set": ({"prompts_file": "p.txt"}, ["--train_data_dir and --prompts_file", "give one"]),
    "resolution not divisible by 8": ({"resolution": 100}, ["--resolution is 100", "multiple of 8", "try 96"]),
    "more sampling steps than timesteps": ({"infer_steps": 1001}, ["--infer_steps is 1001", "1000", "lower it"]),
    "unknown reward": ({"reward_model": "clipp"}, ["--reward_model", "did you mean clip"]),
    "no generation batch": ({"generation_batch_size": 0}, ["--generation_batch_size is 0", "at least 1"]),
    "no row to train": ({"train_rows": 0}, ["--train_rows is 0", "at least 1"]),
    "unknown flag": ({"learning_rates": 1}, ["--learning_rates", "--help"]),
    "abbreviated flag": ({"resol": 32}, ["--resol"]),
    "flag of a trajectory": ({"branch_guidance_scale": 2}, ["--branch_guidance_scale", "--help"]),
    "flag of the whole method": ({"generation_reuse": 2}, ["--generation_reuse", "--help"]),
}
NOISED = {
    "negative guidance": ({"guidance_scale": -1}, ["--guidance_scale is -1", "negative"]),
    "bias without effect": ({"timestep_bias_strategy": "later"}, ["--timestep_bias_strategy=later", "multiplier"]),
    "bias beyond the schedule": (
        {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2, "timestep_bias_end": 1001},
        ["--timestep_bias_end is 1001", "1000"],
    ),
    "no set": ({"sets": 0}, ["--sets is 0", "at least 1"]),
    "paths of its own": ({"trajectory_nums": 2}, ["--trajectory_nums", "--help"]),
}
CASES = {
    "DPO": ANY | NOISED
    | {
        "one sample": ({"num_noisy_latents": 1}, ["--num_noisy_latents is 1", "a pair needs 2 samples", "raise it"]),
        "half a pair": ({"train_rows": 1}, ["--train_rows is 1", "a pair has 2 rows", "raise it"]),
        "beta of zero": ({"beta_dpo": 0}, ["--beta_dpo is 0", "above 0"]),
        "no round": ({"rounds": 0}, ["--rounds is 0", "at least 1"]),
        "more rounds than steps": ({"rounds": 3}, ["--rounds is 3", "only 2 optimizer steps", "lower it"]),
        "samples of its own": ({"samples_of": "own"}, ["--samples_of", "--help"]),
    },
    "BEST_OF_N": ANY | NOISED
    | {
        "one sample": ({"num_noisy_latents": 1}, ["--num_noisy_latents is 1", "fewer than 2 samples", "raise it"]),
        "sets of its own": ({"sets": 2}, ["--sets are of the base's samples", "add --samples_of=base"]),
        "samples of somebody": ({"samples_of": "mine"}, ["--samples_of", "own", "base"]),
        "beta": ({"beta_dpo": 10}, ["--beta_dpo", "--help"]),
    },
    "DDPO": ANY
    | {
        "one sample": ({"num_noisy_latents": 1}, ["--num_noisy_latents is 1", "needs 2 samples", "raise it"]),
        "as many steps as the path has": (
            {"trajectory_nums": 5, "infer_steps": 5},
            ["--trajectory_nums is 5", "--infer_steps=5 has 4 steps", "lower it"],
        ),
        "no step": ({"trajectory_nums": 0}, ["--trajectory_nums is 0", "at least 1"]),
        "dropped prompts": ({"proportion_empty_prompts": 0.1}, ["--proportion_empty_prompts", "leave it out"]),
        "guidance": ({"guidance_scale": 1}, ["--guidance_scale", "--help"]),
        "noising": ({"snr_gamma": 5}, ["--snr_gamma", "--help"]),
        "kept samples": ({"sets": 1}, ["--sets", "--help"]),
    },
    "D3PO": ANY
    | {
        "one path": ({"num_noisy_latents": 1}, ["--num_noisy_latents is 1", "a pair needs 2 paths", "raise it"]),
        "no step to train on": ({"infer_steps": 1}, ["--infer_steps is 1", "not trained on", "raise it"]),
        "half a guided pair": ({"train_rows": 3}, ["--train_rows is 3", "a pair has 4 rows", "raise it"]),
        "half a pair": ({"train_rows": 1, "guidance_scale": 1}, ["--train_rows is 1", "2 rows", "raise it"]),
        "beta of zero": ({"beta": 0}, ["--beta is 0", "above 0"]),
        "ratios below zero": ({"ratio_clip": 1}, ["--ratio_clip is 1", "(0, 1)"]),
        "dropped prompts": ({"proportion_empty_prompts": 0.1}, ["--proportion_empty_prompts", "leave it out"]),
        "some steps": ({"trajectory_nums": 2}, ["--trajectory_nums", "--help"]),
        "noising": ({"snr_gamma": 5}, ["--snr_gamma", "--help"]),
        "kept samples": ({"sets": 1}, ["--sets", "--help"]),
    },
}  # fmt: skip


@pytest.fixture
def method(request):
    return request.param


@pytest.mark.parametrize(
    ("method", "case"), [(method, case) for method, cases in CASES.items() for case in cases], indirect=["method"]
)
def test_refused_in_one_sentence(method, case, train, flags, tmp_path, capsys):
    changes, expected = CASES[method][case]
    assert train(flags(**changes)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for part in expected:
        assert part in lines[0]
    assert not (tmp_path / "run").exists()
