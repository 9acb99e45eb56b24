"""Every operation that torch is asked for."""

from torch.utils._python_dispatch import TorchDispatchMode

# What waits for the device: they bring a number to the host.
WAITING = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.nonzero")


class Operations(TorchDispatchMode):
    """Takes down what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def waiting(self):
        return sum(name.startswith(WAITING) for name in self.names)


def operations(case, pipe):
    with Operations() as seen:
        case.run(pipe)
    return seen
