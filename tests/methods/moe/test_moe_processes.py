"""Training networks with experts in two processes, which learn with the same thresholds and biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiers import Process

STEPS, MOMENTUM, RATE = 3, 0.75, 0.01
WORKER = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from flowaccel.data import ImageSet
from flowaccel.methods.moe.networks import MoESiTTransformer2DModel
from flowaccel.methods.moe.control import moe_layers
from flowaccel.training.flow import FlowObjective
from flowaccel.training.loop import LoopConfig, train
from flowaccel.methods.moe.train import MoEObjective, prepare_training

out, (steps, momentum, rate) = Path(sys.argv[1]), map(float, sys.argv[2:])
state = PartialState(cpu=True)
pictures = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(9)) * 2 - 1
data = ImageSet(images=pictures, labels=torch.arange(40) % 10)
loop = LoopConfig(steps=int(steps), learning_rate=1e-2, save_every=2)
for router in ("diffmoe", "deepseek"):
    torch.manual_seed(0)
    network = MoESiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_classes=10, learn_sigma=False,
        moe_config={"router": router, "num_experts": 4, "threshold_momentum": momentum, "bias_rate": rate},
    )
    prepare_training(network)
    (layer,) = moe_layers(network).values()
    found = {}
    observe = layer.thresholds.observe

    def note(observed):
        step = len(found) // len(observed)
        found.update({f"{step}.{kind}": value.clone() for kind, value in observed.items()})
        observe(observed)

    layer.thresholds.observe = note
    goal = MoEObjective(objective=FlowObjective(data=data, null_label=10, batch_size=4))
    for _ in train(network, goal, loop, out / router):
        pass
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    save_file({**found, **weights}, out / f"{router}-{state.process_index}.safetensors")
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, process: Process) -> Path:
    """What each process observed in every step, and the network that it ends with: ROUTER-PROCESS.safetensors."""
    folder = tmp_path_factory.mktemp("trained")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process(*torchrun, worker, folder, STEPS, MOMENTUM, RATE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("router", ["diffmoe", "deepseek"])
def test_thresholds_and_biases_follow_the_mean_of_two_processes(router: str, trained: Path) -> None:
    one, other = (load_file(trained / f"{router}-{process}.safetensors") for process in (0, 1))
    networks = [{name: value for name, value in each.items() if name.startswith("network.")} for each in (one, other)]
    for name, value in networks[0].items():
        assert torch.equal(value.nan_to_num(7.5), networks[1][name].nan_to_num(7.5)), name
    kind, buffer = ("predictor", "thresholds.predictor") if router == "diffmoe" else ("load", "selection_bias")
    steps = [(one[f"{step}.{kind}"], other[f"{step}.{kind}"]) for step in range(STEPS)]
    assert f"{STEPS}.{kind}" not in one
    assert any(not torch.equal(mine, theirs) for mine, theirs in steps), "each has its own data"
    means = [(mine + theirs) / 2 for mine, theirs in steps]
    if router == "diffmoe":
        expected = means[0]
        for mean in means[1:]:
            expected = MOMENTUM * expected + (1 - MOMENTUM) * mean
    else:
        expected = torch.stack([RATE * torch.sign(load.mean() - load) for load in means]).sum(0)
    assert expected.any()
    torch.testing.assert_close(one[f"network.transformer_blocks.1.ff.{buffer}"], expected)
