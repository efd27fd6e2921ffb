"""Networks that return more than one tensor, or something else than diffusers' usual tuple."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput
from torch import Tensor, nn

import flowaccel
import tiny
from flowaccel import UnsupportedModelError
from flowaccel.hooks import session_of, tensors_of

KINDS: dict[str, Any] = {
    "tensor": lambda video, audio: video,  # Kandinsky 5
    "tuple": lambda video, audio: (video,),
    "output": lambda video, audio: Transformer2DModelOutput(sample=video),
    "two": lambda video, audio: (video, audio),  # LTX-2, Kandinsky 6
    "two_as_output": lambda video, audio: AudioVisualModelOutput(sample=video, audio_sample=audio),
    "without_audio": lambda video, audio: (video, None),
    "list_of_two": lambda video, audio: [video, audio],
    "two_lists_of_rows": lambda video, audio: (list(video), list(audio)),
}
LOST: dict[str, Any] = {
    "parts": lambda video, audio: ([list(video)], [list(audio)]),
    "memory": lambda video, audio: (video, {"kv": audio}),  # AnyFlowFAR
    "memory_alone": lambda video, audio: (None, {"kv": audio}),
    "other_rows": lambda video, audio: (video, audio[:1]),
}


class Duet(ModelMixin, ConfigMixin):
    """A network of two outputs; `kind` is how it returns them."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kind = "two"

    def forward(self, hidden_states: Tensor, audio_hidden_states: Tensor, timestep: Tensor) -> Any:
        video = self.layer(hidden_states) * (1 + timestep.view(-1, 1) / 1000)
        return {**KINDS, **LOST}[self.kind](video, (audio_hidden_states + video.sum(1)[:, None]) / 2)


class DuetPipeline(DiffusionPipeline):
    """A minimal pipeline in the pattern of LTX-2: two latents, the second by Euler's method on the same times."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def prepare_latents(self) -> Tensor:
        return torch.ones(2, 4) + torch.arange(2)[:, None]

    @torch.no_grad()
    def __call__(self, copies: int = 1) -> tuple[Tensor, Tensor]:
        self.scheduler.set_timesteps(6)
        x = self.prepare_latents()
        y = torch.linspace(0, 1, 2)[:, None]
        with self.progress_bar(total=6):
            for t in self.scheduler.timesteps:
                found = self.transformer(torch.cat([x] * copies), torch.cat([y] * copies), t.expand(copies * len(x)))
                if isinstance(found, dict):
                    found = found.to_tuple()
                video, *rest = [found] if isinstance(found, Tensor) else tensors_of(found)
                if rest and isinstance(rest[0], Tensor):
                    y = y - 0.1 * rest[0][:2]
                x = self.scheduler.step(video[:2], t, x, return_dict=False)[0]
        return x, y


def duet(kind: str) -> DuetPipeline:
    torch.manual_seed(0)
    network = Duet().eval()
    network.kind = kind
    return tiny.silent(DuetPipeline(network, FlowMatchEulerDiscreteScheduler()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_cached(kind: str, residual: bool) -> None:
    """With a forecast that is exact for what does not change, as much of the second output as of the first."""
    pipe = duet(kind)
    expected = pipe()
    options: dict[str, Any] = {"gate": "interval", "scope": "output", "residual": residual}
    with flowaccel.accelerated(pipe, flowaccel.FeatureCache(**options, interval=1)):
        assert all(map(torch.equal, pipe(), expected))
    kept: list[Any] = []
    inner = pipe.transformer.forward
    with flowaccel.accelerated(pipe, flowaccel.FeatureCache(**options, interval=2, phase=0, predictor="hold")):
        session_of(pipe).on_call(lambda call_next, call: (kept.append(call_next()), kept[-1])[1])
        changed = pipe()
        run = session_of(pipe).last_run
    assert run is not None and [record.what for record in run.records].count("reused") == 2
    assert type(kept[1]) is type(kept[0])
    if "two" in kind:
        computed, reused = map(tensors_of, kept[:2])
        assert torch.equal(reused[1], computed[1]) and not torch.equal(changed[1], expected[1])
    if kind == "without_audio":
        assert kept[1][1] is None
    assert pipe.transformer.forward == inner


@pytest.mark.parametrize("kind", LOST)
def test_what_would_be_lost_is_refused_at_the_first_call(kind: str) -> None:
    pipe = duet(kind)
    calls: list[int] = []
    pipe.transformer.layer.register_forward_hook(lambda *_: calls.append(1))
    flowaccel.accelerate(pipe, "ab_cache")
    with pytest.raises(UnsupportedModelError, match=r"Duet returned .*for 2 rows, and a cache of outputs"):
        pipe()
    assert len(calls) == 1


def test_guidance_skip_stands_in_for_one_output() -> None:
    pipe = duet("two")
    flowaccel.accelerate(pipe, flowaccel.GuidanceSkip())
    with pytest.raises(UnsupportedModelError, match="Duet returns 2 outputs"):
        pipe(copies=2)
