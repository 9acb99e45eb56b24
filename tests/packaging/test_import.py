"""What importing the package costs."""

import json
import subprocess
import sys

import tgate_processors

HEAVY = {"accelerate", "DeepCache", "matplotlib", "numpy", "pandas", "peft", "PIL", "rich", "scipy", "transformers"}


def test_importing_adds_nothing_heavy_to_diffusers():
    code = (
        "import json, sys, torch, diffusers; before = set(sys.modules); import tgate_processors;"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(json.loads(added.splitlines()[-1]))


def test_the_public_names_are_these():
    assert sorted(tgate_processors.__all__) == [
        "MACs",
        "TGateAttnProcessor",
        "TGateCallback",
        "TGateConvergence",
        "TGateCost",
        "TGateLoop",
        "TGateReport",
        "TGateSchedule",
        "apply_tgate",
        "calibrate_schedule",
        "estimate_cost",
        "get_tgate_report",
        "is_tgate_applied",
        "measure_convergence",
        "remove_tgate",
    ]
    assert all(getattr(tgate_processors, name).__doc__ for name in tgate_processors.__all__)
