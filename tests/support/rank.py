"""One of two ranks on which command lines run one after the other: `python rank.py FILE`, RANK and WORLD_SIZE set.

FILE holds a JSON list of {"script", "command", "port", "file_limit"}, where file_limit is null or the bytes that rank
0 may write into a file. Each line runs in a fork of this process, which has imported everything by then. What the rank
did is appended to FILE.RANK, a JSON object a line: its status, how often the UNets ran, on how many rows in all, the
number of elements of the trained weights, how many of them, of their gradients and of the optimizer's states lie here,
and how many elements all UNets and all averages take here, a reference among them; those three at the last optimizer
step.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule

import sharpening.run  # noqa: F401
from sharpening.sharding import local


def count(found):
    """Keep in `found` what passes: forwards of the UNet, and the sizes at an optimizer step."""
    forward, step = UNet2DConditionModel.forward, AcceleratedOptimizer.step

    def counted(self, *args, **options):
        found["forwards"] += 1
        found["rows"] += len(args[0])
        return forward(self, *args, **options)

    def sized(self, *args, **options):
        step(self, *args, **options)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        states = [self.optimizer.state[weight]["exp_avg"] for weight in weights if weight in self.optimizer.state]
        found["elements"] = sum(weight.numel() for weight in weights)
        objects = gc.get_objects()
        unets = [unet for unet in objects if isinstance(unet, UNet2DConditionModel)]
        averages = [ema.shadow_params for ema in objects if isinstance(ema, EMAModel)]
        found["unets"] = taken(weight for unet in unets for weight in unet.parameters())
        found["averages"] = taken(weight for average in averages for weight in average)
        found["notes"] = sum(map(notes_of_order, unets))
        found["here"] = [
            sum(local(tensor).numel() for tensor in tensors)
            for tensors in (weights, [weight.grad for weight in weights], states)
        ]

    UNet2DConditionModel.forward, AcceleratedOptimizer.step = counted, sized


def taken(weights):
    """The elements that the memory of weights has room for."""
    return sum(local(weight).untyped_storage().nbytes() // weight.element_size() for weight in weights)


def notes_of_order(unet):
    """How many blocks FSDP remembers to have run in a frozen UNet."""
    if not isinstance(unet, FSDPModule) or any(weight.requires_grad for weight in unet.parameters()):
        return 0
    return len(unet._get_fsdp_state()._fsdp_param_group.comm_ctx.post_forward_order)


def run(line):
    """Run a line in this process, and note what it did."""
    os.environ["MASTER_PORT"] = str(line["port"])
    if line["file_limit"] and os.environ["RANK"] == "0":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (line["file_limit"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    found = {"forwards": 0, "rows": 0}
    count(found)
    sys.argv[:] = [line["script"], *line["command"]]
    module = importlib.import_module(line["script"].removesuffix(".py").replace("/", "."))
    found["status"] = module.cli(line["command"])
    return found


def main(file):
    for line in json.loads(Path(file).read_text()):
        child = os.fork()
        if child == 0:
            found = run(line)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
            with open(f"{file}.{os.environ['RANK']}", "a") as notes:
                notes.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # what is left of threads may not keep it
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{line['command']}: ended with {status}")


if __name__ == "__main__":
    main(sys.argv[1])
