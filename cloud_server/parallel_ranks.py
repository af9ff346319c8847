"""The ranks of one replica, as seen by one of them: sums, copies from rank 0, and commands.

Two process groups: ``tensors`` for what layers compute (gloo on CPUs, nccl on GPUs) and ``control``, always
gloo, for commands, which are whole numbers of a fixed layout and never pickled. Every call that waits for
other ranks ends with an error once the groups' time is over or a rank is gone. Knows no model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HEAD_INTS = 512  # of a command: what fits travels as one message, the rest follows in a second one
COUNTS = 2  # first numbers of a command: how many follow, and how many elements of tensors after them


class Ranks:
    """One rank's way to the others.

    Parameters
    ----------
    rank, size
        Which of how many; rank 0 leads.
    tensors, control
        Process groups, or backends of such, of all ranks.
    """

    def __init__(self, rank: int, size: int, tensors: Any, control: Any) -> None:
        self.rank, self.size = rank, size
        self._tensors, self._control = tensors, control
        self._from_zero = dist.BroadcastOptions()
        self._from_zero.rootRank, self._from_zero.rootTensor = 0, 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by the sum over all ranks, the same bits everywhere; return it."""
        self._tensors.allreduce([tensor]).wait()
        return tensor

    def share(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by rank 0's; return it."""
        self._tensors.broadcast([tensor], self._from_zero).wait()
        return tensor

    def send(self, command: Sequence[int], elements: int) -> None:
        """Send a command from rank 0, behind which tensors of so many elements will be shared."""
        count = COUNTS + len(command)
        numbers = torch.zeros(max(HEAD_INTS, count), dtype=torch.int64)
        numbers[:count] = torch.tensor([len(command), elements, *command], dtype=torch.int64)
        self._control.broadcast([numbers[:HEAD_INTS]], self._from_zero).wait()
        if count > HEAD_INTS:
            self._control.broadcast([numbers[HEAD_INTS:]], self._from_zero).wait()

    def receive(self) -> tuple[list[int], int]:
        """Return rank 0's next command, and how many elements of tensors will be shared behind it."""
        head = torch.empty(HEAD_INTS, dtype=torch.int64)
        self._control.broadcast([head], self._from_zero).wait()
        numbers = head.tolist()
        count, elements = numbers[0], numbers[1]
        if COUNTS + count > HEAD_INTS:
            rest = torch.empty(COUNTS + count - HEAD_INTS, dtype=torch.int64)
            self._control.broadcast([rest], self._from_zero).wait()
            numbers += rest.tolist()
        return numbers[COUNTS : COUNTS + count], elements

    def agree(self, numbers: Sequence[int], meeting: Any) -> bool:
        """Return whether this rank has the same numbers as rank 0, once all have come to ask.

        ``meeting`` is a group of all ranks that waits for as long as loading may take: the other two would
        give up on a rank that has a model to fetch first.
        """
        meeting.barrier().wait()
        if self.rank == 0:
            self.send(numbers, 0)
            return True
        return self.receive()[0] == list(numbers)

    def count(self) -> int:
        """Return how many ranks take part in this very call: all, or it fails."""
        one = torch.ones(1, dtype=torch.int64)
        self._control.allreduce([one]).wait()
        return int(one)
