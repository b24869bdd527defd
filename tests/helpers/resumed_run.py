"""A sharded run that saves itself after every step and goes on where it was; see test_sharded.py.

python -m torch.distributed.run ... resumed_run.py FOLDER KILLED: one rank dies in the middle of step KILLED, in the
first attempt.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.ranks import leave_group
from helpers.sharded_model import loss_of, net, shard_rows, whole
from ltp_sparse import MaskedAdamW, Ticket

STEPS = 4


def train(rank, world, folder, killed=0, attempt="0"):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{attempt}", rank=rank, world_size=world)
    model = net(torch.bfloat16)
    ticket = Ticket.random(model, density=0.2)
    shard_rows(model, init_device_mesh("cpu", (world,)))
    optimizer = MaskedAdamW(model, ticket, lr=0.01, max_grad_norm=1.0, gradients="packed")
    done = max((int(path.name) for path in folder.glob("[0-9]*") if (path / ".metadata").exists()), default=0)
    if done:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(state, checkpoint_id=folder / str(done))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(done + 1, STEPS + 1):
        loss_of(model, 2 * step + rank).backward()
        if step == killed and rank == 1 and attempt == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(state, checkpoint_id=folder / str(step))
    found = {name: whole(param.detach()) for name, param in model.named_parameters()}
    if rank == 0:
        torch.save({"model": found, "restarts": int(attempt), "started at": done}, folder / "final.pt")
    distributed.barrier()
    leave_group()


if __name__ == "__main__":
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]  # gloo finds the dead ranks in torchrun's own store
    train(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]), int(sys.argv[2]), attempt)
