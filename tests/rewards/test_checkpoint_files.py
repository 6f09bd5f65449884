"""Checkpoints that cannot be had, or are none."""

import pickle
from pathlib import Path

import pytest
import torch

from reward import load_reward
from sharpening.errors import UserError


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pickscore:/nowhere", "--reward_model pickscore:/nowhere could not be loaded"),
        ("pickscore", "could not be loaded"),
        ("hpsv2", "HPS_v2.1_compressed.pt of xswu/HPSv2 could not be had from the hub"),
        ("hpsv2:./nowhere.pt", "there is no file ./nowhere.pt"),
        ("aesthetic", "of camenduru/improved-aesthetic-predictor could not be had from the hub"),
        ("aesthetic:{folder}", "holds no sac+logos+ava1-l14-linearMSE.pth"),
        ("aesthetic:{folder}/junk.pt", "junk.pt is not a checkpoint"),
        ("aesthetic:{folder}/list.pt", "list.pt holds no state dict"),
        ("image_reward", "ImageReward.pt of THUDM/ImageReward could not be had from the hub"),
        ("image_reward:word", "there is no file word"),
        ("compositional", "the files of comin/IterComp could not be listed"),
        ("compositional:word", "there is no folder word"),
    ],
)
def test_checkpoint_that_cannot_be_had_is_one_sentence(spec, said, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError) as caught:
        load_reward(spec.format(folder=tmp_path))
    message = str(caught.value)
    assert "--reward_model" in message and said in message and "\n" not in message


def test_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_reward(f"aesthetic:{tmp_path}/evil.pt")
    assert not (tmp_path / "ran").exists()
