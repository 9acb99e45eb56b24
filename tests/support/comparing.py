"""How far two outputs are apart, and an error that nothing else raises."""

import torch


def distance(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class Stop(RuntimeError):
    """Not an error of diffusers'."""


def assert_same_but_for_rounding(a, b):
    """Copied weights lie elsewhere, and with some alignments some CPUs add up in another order, without T-GATE too."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
