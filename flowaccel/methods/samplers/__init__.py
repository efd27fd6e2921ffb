"""Other samplers: fewer or cheaper steps for the same network. The schedulers are in `flowaccel.samplers`."""

from flowaccel.recipe.registry import Method, Preset

_SUMMARIES = {
    "euler": "Euler's method, one evaluation a step.",
    "heun": "Heun's method, two evaluations a step.",
    "midpoint": "The midpoint method, two evaluations a step.",
    "rk4": "The classical Runge-Kutta method, four evaluations a step.",
    "ab2": "Adams-Bashforth of second order, one evaluation a step.",
    "sde": "SiT's stochastic sampler (arXiv 2401.08740).",
}

METHOD = Method(
    accelerators={"sampler": "flowaccel.recipe.sampler:Sampler"},
    presets={
        name: Preset(summary=summary, make="flowaccel.recipe.sampler:sampler_with", arguments={"sampler": name})
        for name, summary in _SUMMARIES.items()
    },
)
