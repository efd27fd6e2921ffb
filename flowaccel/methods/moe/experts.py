"""Expert feed-forwards, with their weights packed into one tensor per layer, and the backends that run them.

Shapes: S tokens in a pool, D width, H hidden width of an expert, E experts, P pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional

from flowaccel.methods.moe.plans import ExpertPlan

GATED: dict[str, Callable[[Tensor], Tensor]] = {"geglu": functional.gelu, "swiglu": functional.silu}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu-approximate": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "linear-silu": functional.silu,
}
"""diffusers' names of activations."""
BACKENDS = ("auto", "loop", "bmm", "grouped_mm")
_BMM_ROWS = 256
"""Tokens of an expert up to which `bmm` is faster on the CPU: measured to be so at 128, and not at 512."""
_ALIGNMENT = 16
"""Bytes that rows of grouped_mm's operands must be multiples of."""


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """Shape of one expert."""

    dim: int
    inner_dim: int
    activation_fn: str = "gelu-approximate"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.activation_fn not in (*PLAIN, *GATED):
            raise ValueError(f"activation_fn must be one of {[*PLAIN, *GATED]}, got {self.activation_fn!r}")

    @property
    def rows(self) -> int:
        """Output rows of the first layer: twice the hidden width for gated activations."""
        return self.inner_dim * (2 if self.activation_fn in GATED else 1)

    @property
    def macs(self) -> int:
        """Multiply-adds of an expert's matrix products for one token."""
        return self.rows * self.dim + self.dim * self.inner_dim

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply the activation: (..., rows) -> (..., H); if gated, the first half is the value, as in diffusers."""
        if self.activation_fn in PLAIN:
            return PLAIN[self.activation_fn](hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return value * GATED[self.activation_fn](gate)

    @classmethod
    def of(cls, dense: FeedForward) -> ExpertShape:
        """Return the shape of a diffusers feed-forward.

        Raises:
            ValueError: an activation or layers that experts do not have.
        """
        layers: list[Any] = list(getattr(dense, "net", ()))
        name = next((name for name, known in _ACTIVATIONS.items() if layers and known(layers[0])), None)
        if name is None or len(layers) != 3 or not isinstance(layers[2], nn.Linear):
            raise ValueError(
                f"experts can be made of a diffusers FeedForward with one of {list(_ACTIVATIONS)}, got {dense}"
            )
        first, last = _first_linear(dense), layers[2]
        return cls(dim=first.in_features, inner_dim=last.in_features, activation_fn=name, bias=first.bias is not None)


def _activation(kind: str, approximate: str | None = None) -> Callable[[Any], bool]:
    def is_it(module: Any) -> bool:
        return type(module).__name__ == kind and getattr(module, "approximate", None) == approximate

    return is_it


_ACTIVATIONS = {
    "gelu": _activation("GELU", "none"),
    "gelu-approximate": _activation("GELU", "tanh"),
    "geglu": _activation("GEGLU"),
    "swiglu": _activation("SwiGLU"),
    "linear-silu": _activation("LinearActivation"),
}


def _first_linear(dense: FeedForward) -> nn.Linear:
    found: nn.Linear = dense.net[0].proj
    return found


class Experts(nn.Module):
    """E feed-forwards of one shape, packed: `w_in` (E, rows, D), `b_in` (E, rows), `w_out` (E, D, H), `b_out` (E, D).

    Layouts are those of `nn.Linear`, so that its weights are copied in as they are.

    Args:
        count: E, at least 1.
        shape: shape of every expert.
    """

    def __init__(self, count: int, shape: ExpertShape) -> None:
        super().__init__()
        self.shape = shape
        self.w_in: nn.Parameter = nn.Parameter(torch.empty(count, shape.rows, shape.dim))
        self.w_out: nn.Parameter = nn.Parameter(torch.empty(count, shape.dim, shape.inner_dim))
        self.b_in: nn.Parameter | None = nn.Parameter(torch.zeros(count, shape.rows)) if shape.bias else None
        self.b_out: nn.Parameter | None = nn.Parameter(torch.zeros(count, shape.dim)) if shape.bias else None
        self.backend = "auto"
        for weight in (*self.w_in, *self.w_out):
            nn.init.xavier_uniform_(weight.data)

    def __len__(self) -> int:
        return len(self.w_in)

    def forward(self, pool: Tensor, plan: ExpertPlan) -> Tensor:
        """Return weighted sums over every token's experts, (S, D) -> (S, D), in the dtype of the plan's weights."""
        output = pool.new_zeros(pool.shape, dtype=plan.weights.dtype)
        if not plan.pairs:
            return output
        return _RUN[self._backend(pool, plan)](self, pool, plan, output)

    def copy_(self, expert: int, dense: FeedForward) -> None:
        """Copy the weights of a feed-forward of the same shape into an expert."""
        first, last = _first_linear(dense), dense.net[2]
        with torch.no_grad():
            self.w_in[expert].copy_(first.weight)
            self.w_out[expert].copy_(last.weight)
            for packed, linear in ((self.b_in, first), (self.b_out, last)):
                if packed is not None:
                    packed[expert].copy_(linear.bias)

    def alone(self) -> list[Callable[[Tensor], Tensor]]:
        """Return every expert as a function, (n, D) -> (n, D).

        The weights are unbound once for all experts, because every indexing of a packed tensor would cost a gradient of
        its whole size.
        """
        weights = [[None] * len(self) if packed is None else packed.unbind() for packed in self._packed]
        return [partial(self._alone, *parts) for parts in zip(*weights, strict=True)]

    @property
    def _packed(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.w_in, self.b_in, self.w_out, self.b_out

    def _alone(self, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, rows: Tensor) -> Tensor:
        return functional.linear(self.shape.activate(functional.linear(rows, w_in, b_in)), w_out, b_out)

    def _backend(self, pool: Tensor, plan: ExpertPlan) -> str:
        wanted = fastest(pool, plan) if self.backend == "auto" else self.backend
        runs = {"bmm": plan.each is not None, "grouped_mm": grouped_runs(self.shape, pool)}
        return wanted if runs.get(wanted, True) else "loop"


class ExpertModules(nn.ModuleList):
    """Experts as modules with `nn.Linear` layers, `proj_in` and `proj_out`, for LoRA and quantisers."""

    def __init__(self, packed: Experts) -> None:
        super().__init__(ExpertModule(packed, index) for index in range(len(packed)))
        self.shape: ExpertShape = packed.shape
        self.backend: str = packed.backend
        """Backend for when they are packed again; modules run one after the other."""

    def forward(self, pool: Tensor, plan: ExpertPlan) -> Tensor:
        """See `Experts.forward`."""
        return _loop(self, pool, plan, pool.new_zeros(pool.shape, dtype=plan.weights.dtype))

    def alone(self) -> list[Any]:
        """Return every expert as a function."""
        return list(self)

    def packed(self) -> Experts:
        """Return the packed form, with the current weights.

        Raises:
            ValueError: layers that are no plain `nn.Linear` any more, such as an adapter's or a quantiser's.
        """
        modules: list[Any] = list(self)
        for index, module in enumerate(modules):
            for name, linear in module.named_children():
                if type(linear) is not nn.Linear:
                    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
                    raise ValueError(
                        f"expert {index} has a {kind} as {name}, which cannot be packed; fuse and "
                        "unload adapters first, and leave quantised experts unpacked"
                    )
        with torch.device("meta"):
            experts = Experts(len(self), self.shape)
        first, last = [module.proj_in for module in modules], [module.proj_out for module in modules]
        experts.w_in, experts.w_out = _stacked(first, "weight"), _stacked(last, "weight")
        if self.shape.bias:
            experts.b_in, experts.b_out = _stacked(first, "bias"), _stacked(last, "bias")
        experts.backend = self.backend
        return experts.train(self.training)


def _stacked(layers: list[nn.Linear], name: str) -> nn.Parameter:
    parts = [getattr(layer, name) for layer in layers]
    return nn.Parameter(torch.stack([part.detach() for part in parts]), requires_grad=parts[0].requires_grad)


class ExpertModule(nn.Module):
    """Expert of `Experts` as a module, which shares its weights until they are moved."""

    def __init__(self, packed: Experts, index: int) -> None:
        super().__init__()
        self.shape: ExpertShape = packed.shape
        self.proj_in: nn.Linear = _linear(packed.w_in, packed.b_in, index)
        self.proj_out: nn.Linear = _linear(packed.w_out, packed.b_out, index)

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the expert: (n, D) -> (n, D)."""
        found: Tensor = self.proj_out(self.shape.activate(self.proj_in(rows)))
        return found


def _linear(weight: nn.Parameter, bias: nn.Parameter | None, index: int) -> nn.Linear:
    rows, columns = weight.shape[1:]
    with torch.device("meta"):
        linear = nn.Linear(columns, rows, bias=bias is not None)
    linear.weight = nn.Parameter(weight.data[index], requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.data[index], requires_grad=bias.requires_grad)
    return linear


def _loop(experts: Experts | ExpertModules, pool: Tensor, plan: ExpertPlan, output: Tensor) -> Tensor:
    """Run one expert after the other, on its tokens."""
    first = 0
    for expert, size in zip(experts.alone(), plan.sizes(), strict=True):
        if size:
            part = slice(first, first + size)
            tokens = plan.tokens[part]
            computed = expert(pool.index_select(0, tokens))
            output.index_add_(0, tokens, computed * plan.weights[part].unsqueeze(1))
            first += size
    return output


def _bmm(experts: Experts, pool: Tensor, plan: ExpertPlan, output: Tensor) -> Tensor:
    """Run all experts at once, for equally many tokens each."""
    rows = pool.index_select(0, plan.tokens).unflatten(0, (len(experts), -1))
    hidden = experts.shape.activate(_batched(rows, experts.w_in, experts.b_in))
    computed = _batched(hidden, experts.w_out, experts.b_out).flatten(0, 1)
    return output.index_add_(0, plan.tokens, computed * plan.weights.unsqueeze(1))


def _batched(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply one linear layer per expert: (E, k, in) -> (E, k, out)."""
    if bias is None:
        return torch.bmm(rows, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))


def _grouped(experts: Experts, pool: Tensor, plan: ExpertPlan, output: Tensor) -> Tensor:
    """Run all experts at once, for any numbers of tokens."""
    rows = pool.index_select(0, plan.tokens).to(_operand_dtype(pool))
    hidden = _groups(rows, experts.w_in, experts.b_in, plan)
    computed = _groups(experts.shape.activate(hidden), experts.w_out, experts.b_out, plan)
    return output.index_add_(0, plan.tokens, computed * plan.weights.unsqueeze(1))


def _groups(rows: Tensor, weight: Tensor, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    computed = functional.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=plan.ends)
    return computed if bias is None else computed + bias.to(rows.dtype)[plan.experts]


_RUN: dict[str, Callable[[Any, Tensor, ExpertPlan, Tensor], Tensor]] = {
    "loop": _loop,
    "bmm": _bmm,
    "grouped_mm": _grouped,
}


def fastest(pool: Tensor, plan: ExpertPlan) -> str:
    """Return the entry of `BACKENDS` that `auto` takes; what does not run here becomes `loop` afterwards.

    `grouped_mm` is one kernel for all groups only in bfloat16 on these GPUs; elsewhere torch runs them one by one, too.
    On the CPU the hidden layer of one expert stays in the cache, that of all does not (`benchmarks/moe_layer.py`).
    """
    if plan.each is not None:
        return "loop" if pool.device.type == "cpu" and plan.each > _BMM_ROWS else "bmm"
    fused = pool.is_cuda and torch.cuda.get_device_capability(pool.device)[0] in (9, 10)
    return "grouped_mm" if fused and _operand_dtype(pool) == torch.bfloat16 else "loop"


def grouped_runs(shape: ExpertShape, pool: Tensor) -> bool:
    """Whether this torch has `grouped_mm` and it takes these shapes and dtypes; compiled, it takes bfloat16 only.

    Without data there is nothing to run, and torch would not count it.
    """
    if pool.is_meta or not hasattr(functional, "grouped_mm"):
        return False
    dtype = _operand_dtype(pool)
    allowed = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.float32, torch.bfloat16, torch.float16)
    return dtype in allowed and all(size * dtype.itemsize % _ALIGNMENT == 0 for size in (shape.dim, shape.inner_dim))


def _operand_dtype(pool: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: autocast's where it is on, which leaves float64 alone."""
    device = pool.device.type
    casts = torch.is_autocast_enabled(device) and pool.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else pool.dtype
