"""Scoring and selection: `sharpening.selection` against hand computation, in any slices, prompt by prompt."""

import pytest
import torch

from sharpening.selection import begin_samples, score_branches, select
from sharpening.trajectory import Branches, Model, Schedule, walk
from tests.support.objective import SDXL


def test_selection_by_hand():
    rewards = torch.tensor([[1.0, 2.0], [5.0, 0.0], [0.0, 0.0], [9.0, 99.0], [8.0, -99.0], [9.0, 0.0]])
    active = torch.tensor([[True, True]] * 3 + [[True, False]] * 3)
    chosen = select(rewards, active, 3)
    assert chosen.branch_reward.tolist() == [[1.5, 2.5, 0.0], [9.0, 8.0, 9.0]]
    assert chosen.best.tolist() == [1, 0]
    assert chosen.worst.tolist() == [2, 1]
    assert chosen.best_rows.tolist() == [1, 3]
    assert chosen.worst_rows.tolist() == [2, 4]
    assert chosen.tied.tolist() == [False, False] and chosen.decided.tolist() == [True, True]
    tie = select(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool), 3)
    assert tie.tied.tolist() == [True] and tie.decided.tolist() == [False]


def test_branch_without_a_score_is_never_chosen():
    nan = float("nan")
    rewards = torch.tensor(
        [
            [[9.0, nan], [1.0, 2.0], [3.0, 4.0]],  # the best-looking branch lacks one score
            [[-9.0, nan], [1.0, 2.0], [3.0, 4.0]],  # so does the worst-looking one
            [[nan, nan], [-7.0, -7.0], [nan, 0.0]],  # one branch left
            [[nan, nan], [nan, 1.0], [1.0, nan]],  # none left
            [[1.0, nan], [2.0, nan], [0.5, nan]],  # what is not active may be anything
        ]
    )
    active = torch.ones(5, 3, 2, dtype=torch.bool)
    active[4, :, 1] = False
    chosen = select(rewards.flatten(0, 1), active.flatten(0, 1), 3)
    assert chosen.scored.tolist() == [[False, True, True]] * 2 + [[False, True, False], [False] * 3, [True] * 3]
    assert chosen.best[[0, 1, 2, 4]].tolist() == [2, 2, 1, 1]
    assert chosen.worst[[0, 1, 2, 4]].tolist() == [1, 1, 1, 2]
    assert chosen.tied.tolist() == [False, False, True, False, False]
    assert chosen.decided.tolist() == [True, True, False, False, True]


def test_permuting_prompts_permutes_choices():
    rewards = torch.randn(4, 3, 5) + torch.arange(4).view(4, 1, 1) * 100  # one prompt outbids all others
    active = torch.ones(4, 3, 5, dtype=torch.bool)
    permutation = torch.tensor([2, 0, 3, 1])
    before, after = (select(part.flatten(0, 1), active.flatten(0, 1), 3) for part in (rewards, rewards[permutation]))
    assert torch.equal(after.best, before.best[permutation])
    assert torch.equal(after.worst, before.worst[permutation])
    assert (before.branch_reward.argmax(1) == before.best).all()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_scoring_in_slices_equals_scoring_at_once_and_never_mixes_prompts(batch_size):
    schedule = Schedule.from_config(SDXL, 25)
    prompts_of_rows = torch.arange(12) // 3
    t = torch.tensor([0, 30, 79, 500]).repeat_interleave(3)
    branches = Branches.begin(schedule, torch.randn(12, 2, 2, 2), torch.randn(12, 2, 2, 2), t)
    seen = []

    def model(rows):
        scale = (prompts_of_rows[rows] + 1).view(-1, 1, 1, 1) / 10  # a prompt's own model
        return Model(lambda x, t: scale * x)

    def judge(x0_hat, rows):
        seen.extend(rows)
        verdict = x0_hat.mean((1, 2, 3)) + prompts_of_rows[rows], {"mean": x0_hat.mean((1, 2, 3))}
        return lambda: verdict

    scores, path = score_branches(model, judge, schedule, branches, 3, batch_size)
    whole, of_whole = score_branches(model, judge, schedule, branches, 3, 12, outputs=False)
    assert of_whole.output is None and torch.equal(of_whole.t, path.t)
    torch.testing.assert_close(of_whole.x[path.active], path.x[path.active])
    torch.testing.assert_close(scores.rewards, whole.rewards)
    torch.testing.assert_close(scores.last_estimate, whole.last_estimate)
    torch.testing.assert_close(scores.components["mean"], whole.components["mean"], equal_nan=True)
    assert torch.equal(scores.components["mean"].isnan(), ~scores.active)
    assert torch.equal(path.active, scores.active)
    assert scores.active.sum(1).tolist() == [1] * 6 + [2] * 3 + [3] * 3
    assert len(seen) == 2 * int(scores.active.sum())  # inactive steps are never decoded or judged
    for row in range(12):
        scale = (row // 3 + 1) / 10
        alone, start = Model(lambda x, t, s=scale: s * x), branches.rows(torch.tensor([row]))
        for k, point in enumerate(walk(alone, schedule, start.x_t, start.t, 3)):
            if point.active:
                torch.testing.assert_close(path.x[row, k], point.x[0])
                torch.testing.assert_close(path.output[row, k], point.output[0])
                assert path.t[row, k] == point.t
            expected = float(point.x0_hat.mean()) + row // 3 if point.active else 0.0
            assert scores.rewards[row, k].item() == pytest.approx(expected, abs=1e-5)


def test_all_processes_walk_as_far_as_the_one_whose_branches_are_longest():
    schedule, forwards = Schedule.from_config(SDXL, 25), []

    def predict(x, t):
        forwards.append(t.tolist())
        return x / 2

    def judge(latents, rows):
        verdict = latents.mean((1, 2, 3)), {}
        return lambda: verdict

    branches = Branches.begin(schedule, *torch.randn(2, 4, 2, 2, 2), torch.tensor([50, 30, 500, 60]))
    alone, path = score_branches(lambda rows: Model(predict), judge, schedule, branches, 3, 2)
    assert len(forwards) == 2 + 3
    agreed = []
    scores, longer = score_branches(
        lambda rows: Model(predict), judge, schedule, branches, 3, 2, lambda count: agreed.append(count) or 3
    )
    assert agreed == [2, 3] and len(forwards) == 5 + 6
    assert torch.equal(scores.rewards, alone.rewards) and torch.equal(scores.last_estimate, alone.last_estimate)
    for left, right in ((path.x, longer.x), (path.output, longer.output)):
        assert torch.equal(left[path.active], right[path.active])


def test_reward_that_fails_ends_no_walk_and_is_asked_no_more():
    schedule, events = Schedule.from_config(SDXL, 25), []

    def predict(x, t):
        events.append("forward")
        return x

    def judge(latents, rows):
        events.append("begin")
        if len(events) > 3:
            raise OSError("no more")
        return lambda: events.append("wait")

    branches = Branches.begin(schedule, *torch.randn(2, 4, 2, 2, 2), torch.full((4,), 500))
    with pytest.raises(OSError, match="no more"):
        score_branches(lambda rows: Model(predict), judge, schedule, branches, 3, batch_size=2)
    assert events == ["forward", "begin"] * 2 + ["forward"] * 4 + ["wait"]


def test_no_reward_is_waited_for_before_every_step_is_walked():
    schedule, events = Schedule.from_config(SDXL, 25), []

    def predict(x, t):
        events.append("forward")
        return x

    def judge(latents, rows):
        events.append("begin")
        return lambda: events.append("wait") or (latents.mean((1, 2, 3)), {})

    x = torch.randn(4, 2, 2, 2)
    branches = Branches.begin(schedule, x, x, torch.full((4,), 500))
    scores, _ = score_branches(lambda rows: Model(predict), judge, schedule, branches, 3, batch_size=2)
    assert events == ["forward", "begin"] * 6 + ["wait"] * 6
    events.clear()
    samples = begin_samples(judge, scores.last_estimate, batch_size=2)()
    assert events == ["begin"] * 2 + ["wait"] * 2
    torch.testing.assert_close(samples.rewards[:, 0], scores.rewards[:, 2])
