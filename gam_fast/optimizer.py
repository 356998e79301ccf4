"""The optimizer: options, state and groups between the steps. A step is :class:`gam_fast.step.Step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast, overload

import torch
from torch import nn

from . import radius, stored
from .active import STEPS, Rules, StepSchedule
from .amp import GivenScale, LossScale, check_not_forgotten, now
from .backends import Backend, select
from .bases import Given, ascends, filled, members, with_signs
from .buffers import ForwardState
from .coefficients import Coefficients
from .distributed import check_supported, refuse_join
from .groups import AroundBase
from .hooks import any_before, call_before
from .models import ModelOfCopy, Surroundings
from .options import Settings, check_clip, check_share, checked, documented, no_attribute
from .parameters import StepParameters
from .passes import PassDriver, Passes
from .progress import Progress
from .recipe import fold_plan
from .rng import ReplayRNG
from .step import Step
from .turn import Loss, Turn, TurnClosure, evaluation
from .updates import Directions, apply, only_makes_state


@documented
class SharpnessAwareOptimizer(AroundBase):
    """A torch optimizer that gives its base optimizer the direction of a :class:`~gam_fast.recipes.Recipe`.

    Each class of :mod:`gam_fast.methods` (GAM, SAM, …) is this class with one recipe. To try a recipe of your own,
    derive from this class and set ``recipe``. A step is either ``optimizer.step(closure)``, which calls the closure
    once per pass, or the loop ``for turn in optimizer.passes(): loss_fn(model(x), y).backward()``. Several backward
    calls in one pass add up. A step that does not finish (exception, ``break``, KeyboardInterrupt, non-finite gradient)
    leaves parameters, running statistics and random state as they were, bit for bit.

    During a step the gradients belong to the optimizer: it clears them before each pass, and afterwards ``param.grad``
    is the gradient of the last pass (unscaled in place, with a gradient scaler). A gradient that is part of a buffer
    which other code holds is zeroed and stays in place.

    Args:
        params: as everywhere.
        options: those of every method.
        hyper: the recipe's hyper-parameters and, if ``base_optimizer`` is a class, its arguments. If recipe and base
            have a hyper-parameter of the same name (``alpha`` of RMSprop), the keyword is the recipe's. Its key in
            ``param_groups`` then starts with the recipe's name (``gam_alpha``). To set the base's, pass an instance.

    Raises:
        TypeError: complex parameters; a base that needs a closure (LBFGS) or sparse gradients (SparseAdam).
        ValueError: a hyper-parameter out of range, an instance over other parameters, an unknown option, a recipe that
            would need more than three buffers, a ZeroRedundancyOptimizer for a method that keeps a vector.
        RuntimeError: a backend that is not available.

    >>> from gam_fast.recipes import Perturbation, Recipe
    >>> class HalfSAM(SharpnessAwareOptimizer):
    ...     recipe = Recipe("HalfSAM", "", {"rho": 0.05}, path=(Perturbation(0, "rho"),), u=(0.5, 0.5))
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = HalfSAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.375
    """

    _step_supports_amp_scaling: ClassVar[bool] = True  # read by GradScaler.step
    _copied: ModelOfCopy | None
    train: Callable[..., Any]  # train and eval exist only if the base has them, see __getattr__
    eval: Callable[..., Any]

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        model: nn.Module | None = None,
        backend: str = "auto",
        replay_rng: bool | Iterable[Any] = True,
        freeze_running_statistics: bool = True,
        moving_buffers: Sequence[str] = (),
        norm: str = "global",
        clip_grad_norm: float | None = None,
        on_nonfinite: str = "raise",
        sync: str = "global",
        ascent_share: float = 1.0,
        interval: float = 1,
        active: Rules = None,
        **hyper: Any,
    ) -> None:
        options = checked(
            self.recipe,
            replay_rng=replay_rng,
            freeze_running_statistics=freeze_running_statistics,
            moving_buffers=moving_buffers,
            norm=norm,
            clip_grad_norm=clip_grad_norm,
            on_nonfinite=on_nonfinite,
            sync=sync,
            ascent_share=ascent_share,
        )
        self._schedule = StepSchedule(interval, active)
        fold_plan(self.recipe)  # refuses a recipe that needs more than three buffers
        stale = self._build(params, base_optimizer, vars(self).pop("_given"), hyper)
        self._backend_name = backend
        self._backends: dict[torch.device, Backend] = {}
        self._progress = Progress()
        self.model = model
        self._options = options
        for param in self._parameters():
            self._select(param.device)
        self._surroundings = Surroundings()
        self._take_over(stale)

    if not TYPE_CHECKING:  # type checkers would accept any argument and any attribute

        def __new__(cls, *args: Any, **options: Any) -> SharpnessAwareOptimizer:
            """Note which options are given, also at their default values."""
            self = super().__new__(cls)
            self._given = set(options)
            return self

        def __getattr__(self, name: str) -> Any:
            """Forward ``train`` and ``eval`` to the base; explain the names of other packages' methods."""
            if hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property failed: raise its own error
            if name in ("train", "eval") and any(hasattr(base, name) for base in members(self.__dict__.get("base"))):
                return partial(self._switch, name)
            raise AttributeError(no_attribute(type(self).__name__, name), name=name, obj=self)

    @property
    def model(self) -> nn.Module | None:
        """The module being trained. Set it anew if the module is wrapped later (as by ``Accelerator.prepare``).

        Copies and pickles of the optimizer do not contain it: they find the module that holds their parameters.

        Raises:
            TypeError: not a module; or a module of FSDP1 or DeepSpeed, which are not supported.
        """
        if self._copied is not None:
            found = self._copied.find(self._parameters())
            if found is not None or not self._copied.matters:
                self.model = found
        return self._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be one torch.nn.Module (ModuleList([...]) of several), got {model!r:.100}")
        check_supported(model, list(self._parameters()))
        self._model, self._copied = model, None
        self._progress.forward_state = ForwardState()

    @property
    def clip_grad_norm(self) -> float | None:
        """The largest norm of the final direction, or ``None``; may be set between steps."""
        return cast("float | None", self._options["clip_grad_norm"])

    @clip_grad_norm.setter
    def clip_grad_norm(self, limit: float | None) -> None:
        self._refuse_nesting("setting clip_grad_norm")
        check_clip(limit)
        self._options["clip_grad_norm"] = limit

    @property
    def ascent_share(self) -> float:
        """The share of the batch that all passes but the last see; may be set between steps."""
        return cast(float, self._options["ascent_share"])

    @ascent_share.setter
    def ascent_share(self, share: float) -> None:
        self._refuse_nesting("setting ascent_share")
        check_share(share)
        self._options["ascent_share"] = float(share)

    @property
    def interval(self) -> float:
        """The number of steps from one whole recipe to the next; may be set between steps."""
        return self._schedule.interval

    @interval.setter
    def interval(self, interval: float) -> None:
        self._refuse_nesting("setting interval")
        self._schedule.change(interval, self._schedule.active)
        self._complete_groups()

    @property
    def active(self) -> Rules:
        """The rules that choose the steps with the whole recipe; may be set between steps. The first counts from 0."""
        return self._schedule.active

    @active.setter
    def active(self, active: Rules) -> None:
        self._refuse_nesting("setting active")
        self._schedule.change(self._schedule.interval, active)
        self._complete_groups()

    @property
    def decides_in_first_pass(self) -> bool:
        """True if a rule looks at the first gradient, so that :attr:`Turn.last` may change after the first pass."""
        return self._schedule.trigger is not None

    @property
    def skipped_steps(self) -> int:
        """The number of steps undone because of a non-finite gradient (``on_nonfinite="skip"``, or a scaler)."""
        return self._progress.skipped_steps

    @property
    def turn(self) -> Turn | None:
        """The current pass, for code that runs in it, such as a closure; ``None`` between steps."""
        step = self._progress.current
        return None if step is None else step.current

    def passes(self, scaler: Any = None) -> Passes:
        """Return the passes of one step: run forward and backward once in the loop's body for each pass.

        The update happens when the loop asks for another pass after the last, or when :meth:`step` or
        ``scaler.step(optimizer)`` is called in the last pass, as some frameworks do. Leaving the loop early undoes the
        step (details: :class:`~gam_fast.passes.Passes`). The hooks of ``register_step_pre_hook`` and
        ``register_step_post_hook`` run around the update. Pre-hooks find the final direction in ``param.grad``, and the
        update uses what they leave there.

        Args:
            scaler: a :class:`torch.amp.GradScaler`. In each pass call ``turn.backward(loss)``, or
                ``scaler.scale(loss).backward()``. The step itself unscales, steps and updates the scaler, so do not
                call ``scaler.unscale_``, ``scaler.step`` or ``scaler.update``. (A framework that calls ``scaler.step``
                and ``scaler.update`` itself does so in the last pass.) A non-finite gradient in any pass undoes the
                step, whatever ``on_nonfinite`` is. Then the scale goes down and :attr:`skipped_steps` goes up.

        Raises:
            RuntimeError: one of several passes ended without a gradient, or modified a parameter (a write in the first
                pass is not undone); a step of this optimizer is in progress; with a scaler, the loss was not scaled or
                its gradient was unscaled; with ``sync="local"``, another process left the step by an exception.
            TypeError: a sparse gradient.
            NonFiniteGradientError: a gradient with NaN or infinity, unless ``on_nonfinite`` says otherwise.

        Warns:
            UserWarning: backward() was called since the last step; those gradients are not used.
        """
        self._refuse_nesting("passes()")
        return Passes(PassDriver(self, None if scaler is None else self._loss_scale(scaler)))

    @overload
    def step(self, closure: None = None, *, scaler: Any = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss], *, scaler: Any = None) -> Loss: ...
    @overload
    def step(self, closure: TurnClosure[Loss], *, scaler: Any = None) -> Loss: ...
    def step(self, closure: Callable[..., Any] | None = None, *, scaler: Any = None) -> Any:
        """Take one step, and return the result of ``closure`` in the first pass.

        The closure computes the loss and calls backward on it; it is called once per pass. If its only required
        argument is called ``turn``, it gets the :class:`~gam_fast.Turn`, for ``turn.rows(x, y)``. For ``ExactGAM`` it
        returns the loss and does not call backward. The result is the loss at θ, or at the perturbed point if the
        method's only gradient is there. Without a closure, ``Base`` uses the present gradients, as any torch optimizer;
        other methods refuse. In the last pass of a loop over :meth:`passes`, this call takes the step at once, and the
        loop ends.

        Args:
            closure: evaluates the loss; with a ``scaler``, it calls ``scaler.scale(loss).backward()``.
            scaler: a :class:`torch.amp.GradScaler`, as for :meth:`passes`.

        Raises:
            RuntimeError, TypeError, NonFiniteGradientError: see :meth:`passes`.
            TypeError: a closure that is not a function, or needs other arguments.

        >>> from gam_fast import Base
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = Base([weight], torch.optim.SGD, lr=0.5)
        >>> def closure():
        ...     loss = (weight**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        25.0
        """
        given = GivenScale.handed_to(self)
        try:
            step = self._progress.current
            if (
                step is not None
                and step.by_loop
                and (step.phase == "complete" or (step.in_last_pass and closure is None))
            ):
                return self._end(step, closure, given, scaler)
            self._refuse_nesting("step()")
            scale = None if scaler is None else self._loss_scale(scaler)
            if closure is None:
                self._step_without_closure(scale or given)
                return None
            evaluate = evaluation(closure)
            if given is not None:
                raise RuntimeError(
                    "scaler.step(optimizer, closure): a gradient scaler takes no closure. Call step(closure, "
                    "scaler=scaler), or run the loop over passes(scaler=scaler)"
                )
        except BaseException:
            GivenScale.drop(self)
            raise
        first = None
        with self._begin(scale, by_loop=False) as step, step:  # entered twice: a Ctrl-C may interrupt the first exit
            while (turn := step.next_pass()) is not None:
                with torch.enable_grad():
                    loss = evaluate(turn)
                if self.recipe.second_order:
                    turn.backward(loss)
                    loss = loss.detach()  # its graph would live as long as the loss does
                if turn.index == 0:
                    first = loss
            step.finish(self._update)
        return first

    def _end(self, step: Step, closure: Callable[[], Any] | None, given: GivenScale | None, scaler: Any) -> Any:
        """End the step of a loop, in or after its last pass; call the closure of a wrapper such as Lightning's."""
        result = None
        with step:
            if scaler is not None:
                raise RuntimeError("step(scaler=) in the last pass of a loop: the loop is passes(scaler=scaler)")
            if given is not None:
                step.unscale_by(given)
            if step.phase == "pass":
                step.advance()
            elif closure is not None:
                result = closure()
            step.finish(self._update)
        return result

    def _step_without_closure(self, scale: LossScale | GivenScale | None) -> None:
        if self.recipe.moves:
            if only_makes_state(self.base):
                self.base.step()
                if self.recipe.memory is not None and self.recipe.memory.is_updated:
                    made = stored.make(self._parameters(), self.recipe.memory.name, self.base.state)
                    self._progress.begin_with = partial(stored.forget, made, self.recipe.memory.name, self.base)
                return
            several = self.recipe.passes > 1
            what = f"{self.recipe.passes} passes a step" if several else "its gradient at another point"
            raise RuntimeError(
                f"{type(self).__name__} takes {what}: call step(closure), which is called once a pass, or run forward "
                "and backward in `for turn in optimizer.passes():`. Where a GradScaler or a framework calls step() "
                "without a closure (scaler.step(optimizer), Lightning with precision='16-mixed'), use "
                "passes(scaler=scaler), or bf16; for Transformers, gam_fast.integrations.SharpnessAwareTrainer. "
                "After a loop over passes(), which has taken its step, leave step() out"
            )
        self._progress.check_not_taken(self.base.param_groups, type(self).__name__)
        with self._open(scale) as step, step:
            step.advance()
            step.finish(self._update)

    def micro_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Accumulate gradients: yield the same micro-batches in each pass of a step, whose gradients add up.

        Iterate over it in the body of a loop over :meth:`passes`, or in a closure. The gradient is that of the sum of
        the losses: for the mean, divide each loss by their number. With ``ascent_share`` all passes but the last get
        that share of the micro-batches, and their gradients are scaled up; all processes then need the same number.
        A DistributedDataParallel (``model``) averages gradients only with the last micro-batch.

        An iterator is read once, with the random numbers that reading draws: in the first of several passes, before
        its first micro-batch is used. The micro-batches are held until the step ends. A step with one pass (``Base``,
        an inactive step) reads each when it is used (with DistributedDataParallel one ahead), and holds none.

        Args:
            batches: the micro-batches of the step, such as ``itertools.islice(loader_iterator, 4)``.

        Raises:
            RuntimeError: outside a step.
            ValueError: there are no micro-batches.
        """
        step = self._progress.current
        if step is None:
            where = "iterate over it in the body of `for turn in optimizer.passes():`, or in the closure"
            raise RuntimeError(f"micro_batches() outside a step: {where}")
        return step.micro_batches(batches)

    def _update(self, directions: Directions) -> Sequence[torch.Tensor]:
        """Call the pre-hooks, and update the parameters."""
        progress = self._progress
        step = progress.step
        assert step is not None
        since = progress.unscaled_since
        if since is not None and step.watch.scale is None:
            progress.unscaled_since = None
            check_not_forgotten(since, self, step.recipe.passes)
        call = progress.call or ((self,), {})
        before = partial(call_before, self, call) if any_before(self) else None
        confirm = step.watch.confirm if step.watch.waits else None
        # with one pass, param.grad stays as the hooks leave it, as with any torch optimizer
        left_alone = apply(self.base, directions, before, confirm, copy=step.recipe.passes > 1)
        progress.updated, progress.unscaled_since = call, None
        return left_alone

    def _loss_scale(self, scaler: Any) -> LossScale | None:
        scale = LossScale(scaler, self)
        return scale if scale.enabled else None

    def _begin(self, scale: LossScale | None, *, by_loop: bool) -> Step:
        """Make a step whose passes compute their own gradients; the parameters are not touched yet."""
        self._refuse_nesting("passes()")
        if (since := self._progress.unscaled_since) is not None and scale is None:  # perhaps undone by an overflow
            check_not_forgotten(since, self, self.recipe.passes)
        self._progress.unscaled_since = since = now()
        step = self._open(scale, by_loop=by_loop, own_gradients=True)
        step.watch.since = since if by_loop else None
        GivenScale.drop(self)  # left by a failed call
        return step

    def _open(
        self, scale: LossScale | GivenScale | None, *, by_loop: bool = False, own_gradients: bool = False
    ) -> Step:
        self._check_can_step()
        progress = self._progress
        begin_with, progress.begin_with = progress.begin_with, None
        if begin_with is not None:
            begin_with()
        if own_gradients:
            progress.warn_of_unused_gradients(self.base.param_groups, type(self).__name__)
        groups, schedule = self.base.param_groups, self._schedule
        recipe, coefficients = self.recipe, progress.coefficients
        if groups and not schedule.is_always:
            if not schedule.fields.keys() <= groups[0].keys():  # a state was loaded into the base optimizer directly
                self._complete_groups()
            refuse_join(self._model, "a step by interval= or active=")
            recipe = schedule.choose(recipe, int(groups[0][STEPS]))
        keys = self._keys if recipe.defaults else {}
        hyper = [{name: group.get(key, self._own_defaults[key]) for name, key in keys.items()} for group in groups]
        name, difference = recipe.difference, None
        for h in hyper:
            if difference is None and name is not None and isinstance(h[name], str):
                difference = radius.Difference.of(groups, hyper, name)
        signed = with_signs(self.base) if self._ascends else groups
        coefficients = coefficients and coefficients.again(recipe, signed, hyper)
        progress.coefficients = coefficients = coefficients or Coefficients(recipe, signed, hyper)
        around = self._surroundings.look(self._model, groups)
        keep, blocks = not around.has_bucket_views, progress.participants
        blocks = blocks and blocks.again(groups, self._select, recipe.name, keep_parts=keep)
        progress.participants = blocks = blocks or StepParameters(groups, self._select, recipe.name, keep_parts=keep)
        settings = Settings(
            recipe,
            self._model,
            forward_state=progress.forward_state,
            schedule=None if schedule.trigger is None else schedule,
            others=around.others,
            difference=difference,
            **self._options,
        )
        left = partial(progress.leave, self)
        progress.step = Step(settings, self.base, coefficients, blocks, scale, left, by_loop=by_loop)
        return progress.step

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_nesting("pickling or copying")
        names = ["recipe", "base", "defaults", "_keys", "_own_defaults", "_backend_name", "_options", "_schedule"]
        found = {name: self.__dict__[name] for name in names if name in self.__dict__}
        model = self._copied or ModelOfCopy.of(self._model, matters=self._options["sync"] != "global")
        return {**found, "skipped_steps": self.skipped_steps, "filled": filled(self.base), "_copied": model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._backends = {}
        self._schedule = StepSchedule()
        self._surroundings = Surroundings()
        self._progress = Progress(state.get("skipped_steps", 0))
        self._model, self._copied = None, None  # pickles of release 0.7.0 and before contain a model
        super().__setstate__({name: value for name, value in state.items() if name not in ("skipped_steps", "filled")})
        for keys, known in zip(filled(self.base), state.get("filled", []), strict=False) if "base" in state else ():
            keys |= known
        self._ascends = "base" in state and ascends(self.base)
        if hasattr(self, "_options"):
            for name, default in (("ascent_share", 1.0), ("norm", "global")):
                self._options.setdefault(name, default)  # older pickles lack them
            if isinstance(self._options["replay_rng"], bool):  # release 0.7.0 and before
                self._options["replay_rng"] = ReplayRNG.wanted(self._options["replay_rng"])

    def __repr__(self) -> str:
        backends = sorted({self._select(param.device).name for param in self._parameters()})
        bases = " + ".join(type(member).__name__ for member in members(self.base))
        name = type(self).__name__
        return f"{name} (base: {bases}, backend: {', '.join(backends)}{super().__repr__().removeprefix(f'{name} (')}"

    def _check_can_step(self) -> None:
        if self._progress.mode == "eval":
            raise RuntimeError("a step after optimizer.eval(): call optimizer.train() before training goes on")
        if self._copied is not None and self.model is None and self._copied is not None:
            raise RuntimeError(
                f"this {type(self).__name__} is a copy without its model (a {self._copied.name}, whose buffers should "
                "move once per step), and no module holds its parameters: set optimizer.model to the module that is "
                "trained, or to None"
            )

    def _select(self, device: torch.device) -> Backend:
        if device not in self._backends:
            self._backends[device] = select(self._backend_name, device)
        return self._backends[device]

    def _kept(self) -> dict[str, float]:
        return {**self._schedule.fields, **super()._kept()}
