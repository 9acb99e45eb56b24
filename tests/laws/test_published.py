"""The published implementation itself, where there are no golden latents of it."""

import pytest
import tgate

from tests.support.comparing import distance
from tests.support.settings import apply_settings
from tests.zoo.catalogue import BY_NAME


@pytest.mark.parametrize(("name", "loader"), [("svd", "TgateSVDLoader"), ("pixart_sigma", "TgatePixArtSigmaLoader")])
@pytest.mark.parametrize(
    "settings",
    [
        {"gate_step": 3, "sp_interval": 1, "fi_interval": 1, "warm_up": 0},
        {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 1},
    ],
    ids=["v1", "v2"],
)
def test_latents_are_those_of_the_published_package(name, loader, settings):
    case = BY_NAME[name]
    ours = case.run(apply_settings(case.build(), **settings))
    output = getattr(tgate, loader)(case.build()).tgate(**case.inputs([0]), **settings)
    assert distance(ours, output.frames if case.video else output.images) < 1e-4
