"""Sessions: run, step, sigma, branch and images of every network call of a pipeline, shared by all accelerators.

A run starts with a call of the scheduler's `set_timesteps`. It ends with the scheduler's last step, when the
pipeline's progress bar closes, or with an exception; without any of these, the next start ends it. All
state belongs to the run, so that none outlives it. Only instances are wrapped, never classes.

A run belongs to the call of the pipeline, or the loop, that started it. All other calls of wrapped objects, by another
pipeline or in another thread, pass through unchanged.
"""

from __future__ import annotations

import functools
import gc
import inspect
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowaccel.compat import foreign_cache
from flowaccel.errors import PipelineBusyError, RecipeConflictError, UnsupportedModelError
from flowaccel.hooks.blocks import BlockHooks, BlockInterceptor, ModuleInterceptor, during
from flowaccel.hooks.callers import Caller, caller_of, is_called
from flowaccel.hooks.calls import COMPUTED, COND, EXTRA, REUSED, UNCOND, Call, CallRecord, Run
from flowaccel.hooks.families import family_of, networks, unwrapped
from flowaccel.hooks.guidance_order import first_is_conditional
from flowaccel.hooks.macs import shapes_of
from flowaccel.hooks.outputs import tensors_of
from flowaccel.hooks.pipeline import Pipeline
from flowaccel.hooks.schedule import by_token, levels, span
from flowaccel.hooks.wrap import Wrapped, entry_point, lend, wrap

_ATTACHED = "_flowaccel_session"

CallInterceptor = Callable[[Callable[..., Any], Call], Any]
"""Wrapper of a network call: `interceptor(call_next, call)` returns the network's return value.

`call_next()` runs the network as it was called, `call_next(arguments)` with other arguments (a dictionary like
`call.arguments`), and `call_next(call.narrowed(rows))` for some of the rows, so that inner wrappers see no others.
"""

StepObserver = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""`observer(velocity, sample, result)` returns None, or a state (images, ...) to continue with instead of `result`.

`velocity` is the guided output of the network, `sample` the state that the scheduler received, and `result` the state
that it returned, (images, ...) each.
"""


class Session:
    """All wrappers on one accelerated pipeline; made by `open_session`."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = weakref.ref(pipe)  # wrappers of the network must not keep the pipeline alive
        self._call_interceptors: list[CallInterceptor] = []
        self._step_observers: list[StepObserver] = []
        self._networks: dict[str, _Network] = {}
        self._scheduler: Any = None
        self._scheduler_wraps: list[Wrapped] = []
        self._latent_rows: int | None = None
        self._latent_channels: int | None = None
        self._runs = 0
        self._conditional_first = False  # in calls of both branches, for derived families
        self._guided_calls: list[_Guided] = []  # of the current step, until the order of the branches is known
        self._blocks = BlockHooks(lambda: self._networks.values())
        self._lock = threading.RLock()
        self._holder: Caller | None = None  # the caller that reserved the pipeline
        self._starter: Caller | None = None  # the caller that started the current run
        self.run: Run | None = None
        """The current run, or the last one."""
        self._last: Run | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline; None once it was garbage-collected."""
        return self._pipe()

    @property
    def last_run(self) -> Run | None:
        """The last run that called a network or began its loop; pipelines also set timesteps that they do not use."""
        run = self.run
        return run if run is not None and (run.begin is not None or run.looped) else self._last

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the model families of the pipeline's networks."""
        return tuple(dict.fromkeys(network.family.name for network in self._networks.values()))

    # -- interface of accelerators

    def on_call(self, interceptor: CallInterceptor) -> Callable[[], None]:
        """Surround every network call of a run with `interceptor(call_next, call)`; returns a function that undoes it.

        The one that was added last is outermost. Calls outside of a run are not surrounded.
        """
        self._call_interceptors.append(interceptor)
        return lambda: self._call_interceptors.remove(interceptor)

    def on_step(self, observer: StepObserver) -> Callable[[], None]:
        """Call `observer(velocity, sample, result)` after every step of a run; returns a function that undoes it."""
        self._step_observers.append(observer)
        return lambda: self._step_observers.remove(observer)

    def on_block(self, interceptor: BlockInterceptor) -> Callable[[], None]:
        """Surround every block in every network call of a run; returns a function that undoes it.

        The result of `interceptor(call_next, call, block)` replaces the block's output.

        Raises:
            UnsupportedModelError: the network's blocks are not known and cannot be derived.
            RecipeConflictError: the network was compiled as a whole.
        """
        return self._blocks.add(interceptor)

    def on_module(self, interceptor: ModuleInterceptor, kinds: tuple[str, ...]) -> Callable[[], None]:
        """Surround the modules of every block whose name starts with one of `kinds`; returns a function that undoes it.

        `kinds` is `ATTENTION` or `FEED_FORWARD`; the result of `interceptor(call_next, call, path)` replaces the
        module's output.

        Raises:
            UnsupportedModelError: the blocks are not known, or have no such modules.
            RecipeConflictError: the network or its blocks were compiled.
        """
        return self._blocks.add_inner(interceptor, kinds)

    # -- wrapping

    def follow(self) -> None:
        """Wrap networks and schedulers that were swapped meanwhile, and those that lost their wrapper.

        Raises:
            RecipeConflictError: another framework caches in a network, or another pipeline's session is on it.
        """
        present = networks(self.pipe)
        for name in list(self._networks):
            if present.get(name) is not self._networks[name].module or not self._networks[name].in_place:
                self._networks.pop(name).unwrap()
        for name, module in present.items():
            _refuse_foreign_cache(name, module)
            if name not in self._networks:
                _refuse_second_session(name, module)
                self._networks[name] = _Network(name, module, self._intercept_network)
                _SESSIONS[module] = weakref.ref(self)
        self._blocks.refresh()
        self._follow_scheduler()

    def methods_of_pipe(self) -> list[tuple[str, Callable[..., Any]]]:
        """Return the pipeline's own methods to wrap, each with its wrapper."""
        interceptors = {
            "check_inputs": self._intercept_check_inputs,
            "progress_bar": self._intercept_progress_bar,
            "prepare_latents": self._intercept_prepare_latents,
            "get_timesteps": self._intercept_get_timesteps,
        }
        return [
            (name, interceptor)
            for name, interceptor in interceptors.items()
            if callable(getattr(self.pipe, name, None))
        ]

    def _follow_scheduler(self) -> None:
        if self._scheduler is self.pipe.scheduler and all(wrapped.reachable for wrapped in self._scheduler_wraps):
            return
        self._unwrap_scheduler()
        self._scheduler = self.pipe.scheduler
        self._scheduler_wraps = [
            wrap(self._scheduler, "set_timesteps", self._intercept_set_timesteps),
            wrap(self._scheduler, "step", self._intercept_step),
        ]

    def _unwrap_scheduler(self) -> None:
        for wrapped in self._scheduler_wraps:
            wrapped.remove()
        self._scheduler, self._scheduler_wraps = None, []

    def close(self) -> None:
        """Remove all wrappers. Idempotent."""
        self._end()
        self._blocks.clear()
        for network in self._networks.values():
            network.unwrap()
        self._networks.clear()
        self._unwrap_scheduler()

    # -- lifecycle

    def _start(self, caller: Caller) -> None:
        self._end()
        self.follow()
        self._last = self.last_run
        self.run, self._starter = Run(index=self._runs), caller
        self._runs += 1
        self._guided_calls.clear()

    def _end(self, failed: bool = False) -> None:
        if self.run is not None:
            self.run.end(failed)

    def _active(self) -> Run | None:
        return None if self.run is None or self.run.ended else self.run

    def _own_run(self) -> Run | None:
        """Return the current run, if the present call belongs to it."""
        run = self._active()
        if run is None or self.pipe is None or self._starter is None:
            return None
        caller = caller_of(self.pipe)
        return run if caller is not None and self._starter.owns(caller) else None

    def _claim(self, caller: Caller) -> None:
        """Reserve the pipeline for `caller`.

        Raises:
            PipelineBusyError: another caller uses it, or it was accelerated or restored meanwhile.
        """
        scheduler = self._scheduler
        with self._lock:
            if self._scheduler is not scheduler:
                raise PipelineBusyError(
                    f"the {type(self.pipe).__name__} was accelerated or restored while this call began; call it again"
                )
            if self._holder is not None and not self._holder.is_same(caller):
                if self._is_busy(self._holder, caller):
                    raise PipelineBusyError(_busy(self.pipe, self._holder.thread == caller.thread))
                self._end(failed=True)  # a run whose caller has ended
            self._holder = caller

    def _is_busy(self, holder: Caller, caller: Caller | None = None) -> bool:
        if holder.own_loop and (self._active() is None or (caller is not None and caller.thread == holder.thread)):
            return False
        return holder.is_running(self.pipe)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Prevent runs from starting inside the context.

        Raises:
            PipelineBusyError: the pipeline is running.
        """
        with self._lock:
            holder = self._holder
            ours = holder is not None and holder.own_loop and holder.thread == threading.get_ident()
            if holder is not None and not ours and self._is_busy(holder):
                raise PipelineBusyError(_busy(self.pipe, holder.thread == threading.get_ident()))
            yield

    def _intercept_check_inputs(self, check_inputs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        caller = caller_of(self.pipe)
        if caller is not None:
            self._claim(caller)  # early, because the call would change the pipeline's state
        return check_inputs(*args, **kwargs)

    def _intercept_set_timesteps(self, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        caller = None if self.pipe is None else caller_of(self.pipe)
        if caller is None:
            return set_timesteps(*args, **kwargs)
        self._claim(caller)
        self._end()
        returned = set_timesteps(*args, **kwargs)
        self._start(caller)
        return returned

    def _intercept_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._own_run()
        if run is None:
            return step(*args, **kwargs)
        try:
            if self._guided_calls:
                self._tell_order(run, inspect.signature(step).bind(*args, **kwargs).arguments.get("model_output"))
            returned = step(*args, **kwargs)
            if self._step_observers and run.images is not None:
                handed = inspect.signature(step).bind(*args, **kwargs).arguments
                returned = self._observed(run.images, handed["model_output"], handed["sample"], returned)
        except BaseException:
            run.end(failed=True)
            raise
        if run.due:  # some pipelines step twice on one output
            run.due, run.stepped, run.clock = False, True, None
            run.steps_done += 1
            if run.steps_done >= run.num_steps:
                run.end()
        return returned

    def _tell_order(self, run: Run, guided: Any) -> None:
        """Determine, at the first guided step, which output was conditional, from the guided output.

        If a batch held the branches in the other order than assumed, the accelerators' work on that call is redone.
        """
        calls, images = self._guided_calls.copy(), run.images or 0
        self._guided_calls.clear()
        outputs = [half for made in calls for half in made.output.split(images)]
        if len(outputs) != 2:
            return
        first, second = outputs
        told = first_is_conditional(first, second, guided[:images]) if isinstance(guided, Tensor) else None
        run.ordered = told is not None if len(calls) == 1 else bool(told)
        if len(calls) == 1 and told not in (None, self._conditional_first):
            self._conditional_first = told
            run.state.clear()
            run.records[:] = [record for record in run.records if record.step != run.steps_done]
            calls[0].again()

    def _observed(self, images: int, velocity: Tensor, sample: Tensor, returned: Any) -> Any:
        """Return the scheduler's output, with the state replaced if an observer returned one."""
        for observer in self._step_observers:
            result = returned[0]
            replaced = observer(velocity[:images], sample[:images], result[:images])
            if replaced is not None:
                # SiT passes a row per branch: those after the first branch are copies of the images' states.
                state = torch.cat([replaced.to(result)] * (len(result) // images))
                returned = (state,) if isinstance(returned, tuple) else type(returned)(prev_sample=state)
        return returned

    def _intercept_progress_bar(self, progress_bar: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bar, run = progress_bar(*args, **kwargs), self._own_run()
        if run is None:
            return bar
        run.looped = True
        if not hasattr(bar, "close"):
            return bar

        def close(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Ends only the run that opened the bar: an aborted run's bar may be collected during the next one.
            run.end(failed=not run.complete and not run.stopped)
            return original(*args, **kwargs)

        wrap(bar, "close", close)
        return bar

    def _intercept_prepare_latents(self, prepare_latents: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        caller = caller_of(self.pipe)
        if caller is None:
            return prepare_latents(*args, **kwargs)
        self._claim(caller)
        returned = prepare_latents(*args, **kwargs)
        latents = returned[0] if isinstance(returned, tuple) else returned
        self._latent_rows = latents.shape[0] if isinstance(latents, Tensor) else None
        self._latent_channels = latents.shape[1] if isinstance(latents, Tensor) and latents.dim() > 1 else None
        return returned

    def _intercept_get_timesteps(self, get_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Translate the number of steps for image to image: some pipelines count our samplers' evaluations instead."""
        count_steps = getattr(self.pipe.scheduler, "count_steps", None)
        bound = inspect.signature(get_timesteps).bind(*args, **kwargs)
        if count_steps is not None and "num_inference_steps" in bound.arguments:
            bound.arguments["num_inference_steps"] = count_steps(bound.arguments["num_inference_steps"])
        return get_timesteps(*bound.args, **bound.kwargs)

    # -- network calls

    def _intercept_network(self, network: _Network, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        pipe = self.pipe
        if pipe is not None and pipe.scheduler is not self._scheduler:  # swapped: its set_timesteps was not seen
            caller = caller_of(pipe)
            if caller is not None:
                self._claim(caller)
                self._start(caller)
        run = self._own_run()
        if run is None:
            with during(None):
                return forward(*args, **kwargs)
        try:
            call = self._describe(run, network, network.bind(args, kwargs), forward)
            output = self._call(call, forward, args, kwargs)
            if call.family.derived and run.ordered is None and EXTRA not in call.branches:
                again = functools.partial(self._intercept_network, network, forward, args, kwargs)
                self._guided_calls += [_Guided(found, again) for found in tensors_of(output)[:1]]
            return output
        except BaseException:
            run.end(failed=True)
            raise

    def _call(self, call: Call, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        record, started = call.record, time.perf_counter()

        def compute(present: Call, arguments: dict[str, Any] | None) -> Any:
            record.what = COMPUTED
            with self._blocks.during(present):
                if arguments is None and present is call:
                    return forward(*args, **kwargs)
                return forward(**(present.arguments if arguments is None else arguments))

        inner: _Inner = compute
        for interceptor in self._call_interceptors:
            inner = _surrounded(interceptor, inner)
        output = inner(call, None)
        record.seconds = time.perf_counter() - started
        call.run.records.append(record)
        return output

    def _describe(self, run: Run, network: _Network, arguments: dict[str, Any], forward: Callable[..., Any]) -> Call:
        clock = arguments.get(network.family.time_argument)
        if run.begin is None:
            run.timesteps, run.sigmas = levels(self.pipe.scheduler)
            run.begin, run.planned = span(self.pipe, run.timesteps, clock, network.family)
            self._refuse_apart(clock)
        run.tick(clock)
        run.due = True
        step = run.steps_done
        if network.name not in run.shapes:
            run.shapes[network.name] = (network.module, shapes_of(arguments), _rows(arguments[network.sample]))
        position = run.position(step)
        branches, images = self._branches(run, network, arguments, step)
        return Call(
            run=run,
            network=network.name,
            module=network.module,
            family=network.family,
            step=step,
            timestep=run.timesteps[position],
            sigma=run.sigmas[position],
            branches=branches,
            images=images,
            arguments=arguments,
            forward=forward,
            record=CallRecord(
                step=step,
                network=network.name,
                branches=branches,
                rows=images * len(branches),
                what=REUSED,
                seconds=0.0,
            ),
        )

    def _refuse_apart(self, clock: Any) -> None:
        """Refuse frames with different timesteps: they are denoised in windows, each of other frames."""
        run = self.run
        assert run is not None
        listed = len(run.timesteps)
        if by_token(clock) and run.num_steps > listed and self._call_interceptors:
            raise UnsupportedModelError(
                f"this {type(self.pipe).__name__} walks its frames through {listed} timesteps one after the other, in "
                f"{run.num_steps} evaluations, and what is cached of one is not what the next computes; let all frames "
                "take the same step (ar_step=0), or call flowaccel.restore on the pipeline"
            )

    def _branches(
        self, run: Run, network: _Network, arguments: dict[str, Any], step: int
    ) -> tuple[tuple[str, ...], int]:
        rows = _rows(arguments[network.sample])
        if run.images is None:
            run.images = self._latent_rows or _images(arguments, network, rows)
            self._latent_rows = None
        copies, rest = divmod(rows, run.images)
        given = [arguments.get(name) for name in network.family.extra]
        if any(value is not None and value is not False for value in given):
            return (EXTRA,), rows
        if copies > 1 and not rest and self._more_than_guidance(run, arguments[network.sample], copies):
            return (COND, *(EXTRA,) * (copies - 1)), run.images
        if copies == 2 and not rest:
            derived, written = network.family.derived, network.family.guidance == "cond_uncond"
            first = self._conditional_first if derived else written
            return (COND, UNCOND) if first else (UNCOND, COND), run.images
        earlier = sum(record.step == step and EXTRA not in record.branches for record in run.records[-8:])
        return ((COND, UNCOND)[earlier],) if earlier < 2 else (EXTRA,), rows

    def _more_than_guidance(self, run: Run, sample: Any, copies: int) -> bool:
        """Return whether a batch holds other branches than the two of guidance.

        InstructPix2Pix has three, and PAG a perturbed one. Frames that are called as rows do not repeat each other.
        """
        if copies == 2:
            return getattr(self.pipe, "do_classifier_free_guidance", None) is False
        if run.repeats is None and isinstance(sample, Tensor) and sample.dim() > 1:
            # Networks that get an image beside the latents have it in further channels, which differ by branch.
            shared = sample.unflatten(0, (copies, -1))[:, :, : self._latent_channels]
            run.repeats = bool((shared == shared[:1]).all())
        return bool(run.repeats)


class _Guided(NamedTuple):
    """A call of the first guided step."""

    output: Tensor
    again: Callable[[], Any]


class _Network:
    """A wrapped network of the pipeline."""

    def __init__(self, name: str, module: nn.Module, interceptor: Callable[..., Any]) -> None:
        self.name, self.module, self.family = name, module, family_of(module)
        self._signature = inspect.signature(unwrapped(module).forward)
        self.sample = next(iter(self._signature.parameters))
        self._entry = entry_point(module)

        def surround(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return interceptor(self, forward, args, kwargs)

        self._wrapped = wrap(module, self._entry, surround)

    @property
    def in_place(self) -> bool:
        """Whether calls still pass through the wrapper, outside of the graph that `module.compile()` traces."""
        return self._wrapped.reachable and self._entry == entry_point(self.module)

    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return dict(self._signature.bind(*args, **kwargs).arguments)

    def unwrap(self) -> None:
        """Remove the wrapper."""
        self._wrapped.remove()
        _SESSIONS.pop(self.module, None)


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def _refuse_second_session(name: str, module: nn.Module) -> None:
    session = _SESSIONS.get(module, lambda: None)()
    if session is None:
        return
    gc.collect()  # a pipeline and its own wrappers refer to each other
    if session.pipe is None:  # garbage-collected without `restore`
        session.close()
        return
    raise RecipeConflictError(
        f"the {name} is shared with a {type(session.pipe).__name__} that is accelerated; call flowaccel.restore on "
        "that pipeline first, or leave this one as it is: its own calls run the shared network untouched"
    )


def _refuse_foreign_cache(name: str, module: nn.Module) -> None:
    found = foreign_cache(module)
    if found is not None:
        raise RecipeConflictError(
            f"the {name} is already cached by another framework, and two caches on one network corrupt each other: "
            f"found {found}"
        )


def _busy(pipe: Pipeline, here: bool) -> str:
    where = "further up in this very thread" if here else "in another thread"
    return (
        f"the {type(pipe).__name__} is in use {where}, and makes one thing at a time: wait until it is done. For calls "
        "at the same time use one pipeline object each: `other = copy.copy(pipe)` with `other.scheduler = "
        "copy.deepcopy(other.scheduler)` shares the networks and runs them untouched; `copy.deepcopy(pipe)` has its "
        "own, and can be accelerated too"
    )


def require_idle(pipe: Pipeline, what: str) -> None:
    """Raise a PipelineBusyError within a callback of the pipeline, or while another thread is in a call of it."""
    if is_called(pipe):
        raise PipelineBusyError(
            f"cannot {what} a {type(pipe).__name__} while it runs; do so when its call has returned"
        )


_Inner = Callable[[Call, dict[str, Any] | None], Any]
"""Computes a call's output, with other arguments than its own if any are given."""


def _surrounded(interceptor: CallInterceptor, inner: _Inner) -> _Inner:
    def run(call: Call, arguments: dict[str, Any] | None) -> Any:
        def call_next(changed: dict[str, Any] | Call | None = None) -> Any:
            if isinstance(changed, Call):
                return inner(changed, None)
            return inner(call, arguments if changed is None else changed)

        return interceptor(call_next, call)

    return run


def _rows(sample: Any) -> int:
    return len(sample) if isinstance(sample, (list, tuple)) else sample.shape[0]


def _images(arguments: dict[str, Any], network: _Network, rows: int) -> int:
    """Return the number of images in a batch, for pipelines without `prepare_latents`.

    It is half the rows if the second half repeats the sample, with the null class if there are classes.
    """
    labels, sample, half = arguments.get("class_labels"), arguments[network.sample], rows // 2
    if rows % 2 or not isinstance(sample, Tensor) or not torch.equal(sample[:half], sample[half:]):
        return rows
    if isinstance(labels, Tensor):
        inner: Any = unwrapped(network.module)
        config = inner.config
        null = config.get("num_classes", config.get("num_embeds_ada_norm"))
        return half if bool((labels[half:] == null).all()) else rows
    return half


class _Attached(NamedTuple):
    """The session and the undo functions that are stored on a pipeline."""

    session: Session
    undo: list[Callable[[], None]]


def open_session(pipe: Pipeline) -> Session:
    """Start observing a pipeline; undone by `close_session`.

    Raises:
        TypeError: the pipeline has no network to accelerate.
        RecipeConflictError: another framework caches in its network, or the network is another accelerated pipeline's.
    """
    session = Session(pipe)
    try:
        session.follow()
    except BaseException:
        session.close()
        raise
    undo = [wrap(pipe, *method).remove for method in session.methods_of_pipe()]
    undo.append(lend(pipe, _ATTACHED, _Attached(session, undo)))
    return session


def close_session(pipe: Pipeline) -> None:
    """Remove everything that `open_session` added. Idempotent."""
    attached = pipe.__dict__.get(_ATTACHED)
    if attached is not None:
        attached.session.close()
        for undo in attached.undo:
            undo()


def session_of(pipe: Pipeline) -> Session:
    """Return the session of a pipeline.

    Raises:
        ValueError: the pipeline has none; `flowaccel.accelerate` opens it.
    """
    attached = pipe.__dict__.get(_ATTACHED)
    if attached is None:
        raise ValueError(f"this {type(pipe).__name__} is not accelerated; call flowaccel.accelerate(pipe, ...)")
    return attached.session
