"""The largest tensor that a piece of code makes: for tests of memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor made while active; views of others are none."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(tree):
            leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            return {leaf.untyped_storage().data_ptr(): leaf.nbytes for leaf in leaves}

        result = function(*args, **(kwargs or {}))
        known = storages((args, kwargs))
        self.made([size for at, size in storages(result).items() if at not in known])
        return result

    def made(self, sizes):
        self.bytes = max([self.bytes, *sizes])
