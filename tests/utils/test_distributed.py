"""Ranks and collectives work alone and in company."""

import os

import torch
import torch.multiprocessing as mp

from utils import distributed, parallel
from utils.joining import session


def test_helpers_alone():
    tensor = torch.arange(3.0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    assert distributed.all_reduce_mean(tensor) is distributed.all_reduce_sum(tensor) is tensor
    assert distributed.all_gather_variable(tensor) is tensor
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"


def test_helpers_in_company(tmp_path):
    mp.spawn(_company, args=(2,), nprocs=2)


def _company(rank: int, world: int) -> None:
    # As submitit's local executor starts it.
    os.environ |= {
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
        "SUBMITIT_LOCAL_NTASKS": str(world),
        "SUBMITIT_LOCAL_JOB_ID": f"test{os.getppid()}",
    }
    torch.set_num_threads(1)
    with session("cpu"):
        assert (distributed.rank(), distributed.world_size()) == (rank, world)
        own = torch.full((rank + 1, 2), float(rank))
        assert distributed.all_reduce_mean(torch.tensor(float(rank))) == 0.5
        count = torch.tensor([rank + 1, 2**60])  # whole numbers stay exact
        assert distributed.all_reduce_sum(count).tolist() == [3, 2**61] and count[0] == rank + 1
        assert distributed.all_reduce_max(torch.tensor([1 - rank, rank])).tolist() == [1, 1]
        assert distributed.all_gather_variable(own).tolist() == [[0, 0], [1, 1], [1, 1]]
        unlike = torch.nn.BatchNorm2d(2)
        unlike.weight.data.fill_(rank)
        unlike.running_mean.fill_(rank)
        parallel.broadcast_state(unlike)
        assert unlike.weight.tolist() == unlike.running_mean.tolist() == [0, 0]
        # A parameter that one rank alone used, and one that nobody did.
        loose = torch.nn.Linear(1, 2)
        loose.weight.grad = torch.full((2, 1), 3.0) if rank else None
        parallel.Gradients(loose).finish()
        assert loose.weight.grad.tolist() == [[1.5], [1.5]] and loose.bias.grad is None
        norm = torch.nn.BatchNorm2d(2)
        norm.running_mean.fill_(rank)
        norm.num_batches_tracked.fill_(3)
        distributed.average_buffers(norm.buffers())
        assert norm.running_mean.tolist() == [0.5, 0.5] and norm.num_batches_tracked == 3
        wide = torch.nn.BatchNorm2d(1).double()
        wide.running_mean.fill_(1 / 3)
        distributed.average_buffers(wide.buffers())
        assert wide.running_mean.tolist() == [1 / 3]
        assert distributed.gather_objects(rank) == [0, 1]
        assert distributed.broadcast_object(rank) == 0
    assert not torch.distributed.is_initialized()
