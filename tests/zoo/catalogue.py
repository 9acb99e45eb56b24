"""All tiny pipelines of which laws are held."""

from tests.zoo.addons import HOSTS
from tests.zoo.audio import CLASS_CONDITIONED
from tests.zoo.core import CASES
from tests.zoo.cross_attention import KINDS
from tests.zoo.joint import JOINT
from tests.zoo.sequential import TWO_CALLS
from tests.zoo.variants import AROUND, AROUND_JOINT, AROUND_TWO

CROSS_ATTENTION = [*KINDS, *AROUND]
SEQUENTIAL = [*TWO_CALLS, *AROUND_TWO]
JOINT_ATTENTION = [*JOINT, *AROUND_JOINT]
ALL = [*CASES, *HOSTS, *CROSS_ATTENTION, *SEQUENTIAL, *JOINT_ATTENTION, *CLASS_CONDITIONED]
BY_NAME = {case.name: case for case in ALL}

# Others of them have the denoiser of one of these.
_OWN = {"any_flow", "stable_audio3", "text_to_video", "controlnet_xs", "sana_world", "ace_step"}
OWN_DENOISERS = [case for case in CROSS_ATTENTION if case.tier == "default" or case.name in _OWN]

# These differ from others in little but their data.
LIKE_OTHERS = {"ltx2", "sana_video", "kandinsky3", "lumina", "audioldm2", "picture_video", "longcat", "helios"}
LIKE_OTHERS |= {"wan_animate", "wan_video", "lucy", "skyreels_image", "chronoedit", "kandinsky5", "cosmos_video"}
LIKE_OTHERS |= {"cosmos2_video", *(case.name for case in JOINT if case.name not in ("sd3", "qwen"))}
# The pipelines that run by default, where a law is held for one of each kind.
MOST = {case.name for case in ALL if case.tier == "default"} - LIKE_OTHERS
